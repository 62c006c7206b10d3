"""What the operators' autograd has in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether real data can be handed to a backend now.

    Then the registered operator is stepped over: its Python autograd costs more than the loss of a small batch.
    Tracing (torch.compile, export, fake tensors) must see the registered operator instead.
    """
    if torch.compiler.is_compiling():
        return False
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks at the call: then it is computed in plain PyTorch.

    No backend knows of tangents, of levels of differentiation or of batch dimensions; kernels run on what is inside the
    wrappers would drop them without a word.
    """
    if _in_transform():
        return True
    if not _in_dual_level():
        return False
    if torch.compiler.is_compiling():  # a trace doesn't say which tensors will come with tangents
        return True
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def holds_values(*tensors: Tensor | None) -> bool:
    """Whether what is decided by the tensors' values, and what is made of them, is good for this call and for others."""
    return runs_eagerly(*tensors) and not is_transformed(*tensors)


def unwrapped(tensor: Tensor) -> Tensor:
    """Detached, and out of all of ``torch.func``'s wrappers, which are dead once the transform is over: for what is kept.

    A batch of ``vmap`` has its dimension again.
    """
    tensor = tensor.detach()  # first: what operators give inside a transform is wrapped
    if torch.compiler.is_compiling():
        return tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def readable(tensor: Tensor | None) -> Tensor | None:
    """What stands in a tensor, for checks of its values: under ``torch.func`` that of all levels and batches together.

    ``None`` where there is nothing to read without waiting: on a device, and in a trace.
    """
    if tensor is None or torch.compiler.is_compiling():
        return None
    tensor = unwrapped(tensor)
    return tensor if tensor.device.type == "cpu" and runs_eagerly(tensor) and tensor.numel() else None


@torch.compiler.assume_constant_result  # compiled code is guarded by the transforms that it was traced under
def _in_transform() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def _in_dual_level() -> bool:
    return forward_ad._current_level >= 0


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Backends choose the type of every product themselves."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def is_one(loss_grad: Tensor) -> bool:
    """Whether this is a plain ``loss.backward()``; only host memory is looked at.

    What was saved can then be handed out, since autograd drops its own reference first. Of a graph that is kept it would
    be handed out again.
    """
    if type(loss_grad) is not Tensor or loss_grad.device.type != "cpu" or _keeps_graph():
        return False
    return loss_grad.item() == 1.0


def _keeps_graph() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()


def distinct(outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """A backend may give one empty tensor for all gradients that nobody wants; an operator's outputs must not alias."""
    return tuple(x if x.numel() else x.clone() for x in outputs)


class Flat(Protocol):
    """A call's fields, which make it again in their order."""

    def flat(self) -> list[Any]: ...


_Problem = TypeVar("_Problem", bound=Flat)


def save_problem(ctx: Any, problem: Flat, backend: str, *outputs: Tensor) -> None:
    """For a backward pass that looks at the inputs again."""
    flat = problem.flat()
    ctx.backend = backend
    ctx.constants = [None if isinstance(x, Tensor) else x for x in flat]
    ctx.is_tensor = [isinstance(x, Tensor) for x in flat]
    ctx.num_outputs = len(outputs)
    ctx.save_for_backward(*outputs, *(x for x in flat if isinstance(x, Tensor)))
    ctx.set_materialize_grads(False)


def saved_problem(ctx: Any, kind: Callable[..., _Problem]) -> tuple[_Problem, bool, list[Tensor]]:
    """The problem, whether it can be handed to a backend now, and the outputs that were saved with it."""
    saved = ctx.saved_tensors  # once: each reading unpacks them anew, and a checkpoint computes them for one alone
    outputs, tensors = saved[: ctx.num_outputs], iter(saved[ctx.num_outputs :])
    flat = [next(tensors) if tensor else x for x, tensor in zip(ctx.constants, ctx.is_tensor, strict=True)]
    return kind(*flat), runs_eagerly(*saved), list(outputs)


Value = Callable[..., Tensor]  # an operator's inputs -> its one output that has gradients, in plain PyTorch
Gradients = Sequence[Tensor | None]


def first_derivatives(
    compute: Callable[[], Gradients], value: Value, upstream: Tensor, inputs: Sequence[Tensor | None]
) -> Gradients:
    """What a backward pass gives: ``compute()``, and under ``create_graph=True`` able to be differentiated again.

    Further derivatives are those of ``value`` in plain PyTorch, which runs only once somebody asks for them.

    Args:
        compute: gives the gradient of each input, or ``None``.
        value: of the inputs.
        upstream: the gradient of what ``value`` gives.
        inputs: the tensors that ``value`` takes, as they stand in the graph.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return compute()
    with torch.no_grad():
        gradients = [None if g is None else g.detach() for g in compute()]
    return _FirstDerivatives.apply(gradients, value, upstream, *inputs)


class Again:
    """How a call whose backward pass doesn't look at its inputs is differentiated again.

    The inputs stand here and not in ``save_for_backward``: the ordinary backward pass would then refuse a bank that was
    filled up in place in the meantime, though it has no more use for it. They are let go of when autograd frees what it
    has saved.
    """

    def __init__(self, operator: str, value: Value, inputs: Sequence[Tensor | None], *constants: Tensor | None) -> None:
        self._operator = operator
        self._call: tuple[Value, Sequence[Tensor | None], Sequence[Tensor | None]] | None = (value, inputs, constants)
        self._versions = _versions(*inputs, *constants)

    def first_derivatives(self, compute: Callable[[], Gradients], upstream: Tensor) -> Gradients:
        if not torch.is_grad_enabled():
            if not _keeps_graph():
                self._call = None
            return compute()
        if self._call is None:
            raise RuntimeError(f"hicl_fast: {self._operator}: expected a graph that is kept, got one that was freed")
        value, inputs, constants = self._call
        if _versions(*inputs, *constants) != self._versions:
            raise RuntimeError(
                f"hicl_fast: {self._operator}: a second derivative needs the inputs as they were, and one of them has been "
                "changed in place since"
            )
        return first_derivatives(compute, value, upstream, inputs)


def _versions(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None or x.is_inference() else x._version for x in tensors]


class _FirstDerivatives(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradients: Gradients, value: Value, upstream: Tensor, *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.value = value
        ctx.wanted = [g is not None for g in gradients]
        ctx.save_for_backward(upstream, *inputs)
        ctx.set_materialize_grads(False)
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *upstream_again: Tensor | None) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), without_autocast(saved[0].device.type):  # type: ignore[union-attr]
            # Apart from one another where the same tensor was given twice.
            upstream, *inputs = (None if x is None else x.view_as(x) for x in saved)
            assert upstream is not None
            wanted = [x for x, is_wanted in zip(inputs, ctx.wanted, strict=True) if is_wanted and x is not None]
            first = torch.autograd.grad(
                ctx.value(*inputs), wanted, upstream, create_graph=True, allow_unused=True, materialize_grads=True
            )
            given = [g for g, is_wanted in zip(upstream_again, ctx.wanted, strict=True) if is_wanted]
            pairs = [(f, g) for f, g in zip(first, given, strict=True) if g is not None and f.requires_grad]
            sources = [x for x in (upstream, *inputs) if x is not None and x.requires_grad]
            second: Sequence[Tensor | None] = [None] * len(sources)
            if pairs:
                outputs, again = zip(*pairs, strict=True)
                second = torch.autograd.grad(outputs, sources, again, create_graph=create_graph, allow_unused=True)
        found = iter(second)
        return None, None, *(next(found) if x is not None and x.requires_grad else None for x in (upstream, *inputs))


def once_differentiable(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a backward function whose results can't be differentiated again, and say so where someone does."""
    message = f"hicl_fast: {operator} can be differentiated once; its gradient has no gradient of its own."

    def decorate(backward: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Any]:
        def run(ctx: Any, *upstream: Tensor | None) -> Any:
            if not torch.is_grad_enabled():  # the ordinary backward pass
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            refuse = torch._C._functions.DelayedError(message.encode(), len(gradients))
            return refuse(*(None if g is None else g.detach().requires_grad_() for g in gradients))  # type: ignore[arg-type]

        return run

    return decorate
