"""Breaks the code by hand, a line at a time, and says which tests see it: a test that sees nothing tests nothing.

    python -m tools.breaks                      all of them, one after the other
    python -m tools.breaks own-bias groups      some of them, by name
    python -m tools.breaks --layer cpp --json breaks.json

Each break is applied to a copy of the checkout, compiled there if it is in csrc/, and the tests that should see it are run.
The checkout itself is never changed. Exit status 1: a break that nobody saw, or one that no longer fits the source.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds of a break's tests; one that never ends is seen as well


@dataclass(frozen=True)
class Break:
    """``old``, which stands once in ``file``, becomes ``new``; ``tests`` are pytest's arguments for who should see it."""

    name: str
    layer: str
    file: str
    old: str
    new: str
    tests: str


@dataclass(frozen=True)
class Seen:
    """What came of a break."""

    name: str
    layer: str
    by: list[str]  # the tests that failed
    num_passed: int
    seconds: float
    problem: str = ""  # why it could not be tried

    @property
    def is_seen(self) -> bool:
        return bool(self.by) and not self.problem


RULES = "tests/ops/test_rules.py"
INFO_NCE = "tests/ops/test_info_nce.py"
BREAKS = (
    # --- the backend torch
    Break(
        "margin-slope",
        "torch",
        "hicl_fast/ops/info_nce/rows.py",
        "derivative = math.cos(margin) + s / sine * math.sin(margin)",
        "derivative = math.cos(margin) + s * math.sin(margin)",
        f"{INFO_NCE} -k 'torch and margin'",
    ),
    Break(
        "groups-excluded",
        "torch",
        "hicl_fast/ops/info_nce/torch.py",
        "logits.masked_fill_(in_group, -torch.inf)",
        "logits.masked_fill_(~in_group, -torch.inf)",
        f"{INFO_NCE} -k 'torch and groups'",
    ),
    Break(
        "own-bias-scaled",
        "torch",
        "hicl_fast/ops/info_nce/torch.py",
        "own -= own_grad * kind.rules.bias",
        "pass",
        f"{INFO_NCE} -k torch",
    ),
    Break(
        "column-direction",
        "torch",
        "hicl_fast/ops/info_nce/rows.py",
        "_share(column_lse, positive_logit) * (loss_grad / 2)",
        "_share(column_lse, positive_logit) * loss_grad",
        f"{INFO_NCE} -k 'torch and symmetric'",
    ),
    Break(
        "limit-of-positives",
        "torch",
        "hicl_fast/ops/info_nce/torch.py",
        "above[:, kind.place] &= ~positives",
        "pass",
        f"{RULES} -k 'torch and positive'",
    ),
    Break(
        "one-relation",
        "torch",
        "hicl_fast/ops/info_nce/torch.py",
        "found |= query_group[:, None, relation]",
        "found &= query_group[:, None, relation]",
        f"{RULES} -k 'torch and relations'",
    ),
    Break(
        "hardness-scaled",
        "torch",
        "hicl_fast/ops/info_nce/torch.py",
        "products[:, kind.place] *= self.scale / (self.scale + kind.rules.hardness)",
        "pass",
        f"{RULES} -k 'torch and hard'",
    ),
    Break(
        "limit-is-lowest",
        "torch",
        "hicl_fast/ops/info_nce/rows.py",
        "torch.where(positive > 0, torch.minimum(found, positive * problem.false_negative_ratio), found)",
        "torch.minimum(found, positive * problem.false_negative_ratio)",
        f"{RULES} -k 'torch and ratio'",
    ),
    Break(
        "list-of-the-next-row",
        "torch",
        "hicl_fast/ops/info_nce/torch.py",
        "row = row - chunk.rows.start",
        "row = row + 1 - chunk.rows.start",
        f"{RULES} -k 'torch and several'",
    ),
    Break(
        "own-of-the-next",
        "torch",
        "hicl_fast/ops/own_negatives/torch.py",
        "query_grad.index_add_(0, query_of_rows, weight * unit.rows)",
        "query_grad.index_add_(0, query_of_rows.roll(1), weight * unit.rows)",
        f"{RULES} -k 'torch and own'",
    ),
    Break(
        "first-of-equals",
        "torch",
        "hicl_fast/ops/hard_negatives/torch.py",
        "descending=True, stable=True)",
        "descending=True)",
        "tests/ops/test_hard_negatives.py -k torch",
    ),
    Break(
        "zero-weights",
        "torch",
        "hicl_fast/ops/segment_pool/torch.py",
        "torch.where(total == 0, 0.0, 1.0 / total)[sequence]",
        "(1.0 / total)[sequence]",
        "tests/ops/test_segment_pool.py",
    ),
    Break(
        "mixture-of-opposites",
        "torch",
        "hicl_fast/ops/mixed_negatives/torch.py",
        "torch.where(squared < smallest, 0.0, squared.rsqrt())",
        "squared.rsqrt()",
        "tests/ops/test_mixed_negatives.py -k torch",
    ),
    # --- what operators share
    Break(
        "long-rows",
        "common",
        "hicl_fast/ops/common/unit_rows.py",
        "power = _into_range(norm) if x.dtype != torch.float16 else None",
        "power = None",
        "tests/ops/test_lengths.py -k torch",
    ),
    Break(
        "tiny-rows",
        "common",
        "hicl_fast/ops/common/unit_rows.py",
        "return self.factor >= 1 / NORM_FLOOR",
        "return torch.zeros_like(self.factor, dtype=torch.bool)",
        "tests/ops/test_lengths.py tests/ops/test_info_nce.py -k torch",
    ),
    Break(
        "host-scale",
        "common",
        "hicl_fast/ops/common/numbers.py",
        "torch.promote_types(temperature.dtype, sum_type(query, *others))",
        "temperature.dtype",
        "tests/ops/test_info_nce.py tests/ops/test_rounding.py tests/losses/test_temperature.py",
    ),
    # --- autograd
    Break(
        "upstream-gradient",
        "autograd",
        "hicl_fast/ops/info_nce/operator.py",
        "return to.take(gradient) if handed_out else to.take_scaled(gradient, loss_grad)",
        "return to.take(gradient)",
        f"{INFO_NCE} -k 'torch or cpp'",
    ),
    Break(
        "handed-out-twice",
        "autograd",
        "hicl_fast/ops/common/autograd.py",
        'if type(loss_grad) is not Tensor or loss_grad.device.type != "cpu" or _keeps_graph():',
        'if type(loss_grad) is not Tensor or loss_grad.device.type != "cpu":',
        "tests/ops/test_derivatives.py tests/ops/test_info_nce.py",
    ),
    Break(
        "changed-in-place",
        "autograd",
        "hicl_fast/ops/common/autograd.py",
        "if _versions(*inputs, *constants) != self._versions:",
        "if False:",
        "tests/ops/test_derivatives.py",
    ),
    Break(
        "autocast-inside",
        "autograd",
        "hicl_fast/ops/common/autograd.py",
        "    if torch.is_autocast_enabled(device_type):\n",
        "    if False:\n",
        "tests/ops/test_info_nce.py tests/ops/test_segment_pool.py",
    ),
    Break(
        "fake-gradient-type",
        "autograd",
        "hicl_fast/ops/info_nce/operator.py",
        "return problem.query.new_empty(value.shape if is_wanted else (0,), dtype=problem.dtype)",
        "return problem.query.new_empty(value.shape if is_wanted else (0,))",
        f"{INFO_NCE} tests/ops/test_derivatives.py",
    ),
    # --- arguments
    Break(
        "target-range",
        "arguments",
        "hicl_fast/ops/info_nce/problem.py",
        "if low < 0 or high >= self.key.shape[0]:",
        "if low < 0:",
        f"{INFO_NCE} tests/test_functional.py",
    ),
    Break(
        "shapes-of-operators",
        "arguments",
        "hicl_fast/ops/common/shapes.py",
        'if not fits or ("N" in shape and x.shape[shape.index("N")] == 0):',
        "if False:",
        "tests/ops/test_wrong_operands.py",
    ),
    Break(
        "backend-asked-for",
        "arguments",
        "hicl_fast/ops/backends/registry.py",
        "    if refusal:\n",
        "    if False:\n",
        "tests/test_functional.py tests/ops/test_info_nce.py",
    ),
    # --- C++
    Break(
        "exp-total",
        "cpp",
        "csrc/cpu/rows_impl.h",
        "    const Vec<T> e = exp<T>((v - offset) * scale);\n    total += e;",
        "    const Vec<T> e = exp<T>((v - offset) * scale);\n    total = e;",
        "tests/ops/test_paradigm.py -k cpp",
    ),
    Break(
        "row-tails",
        "cpp",
        "csrc/cpu/rows_impl.h",
        "  return n == kWidth<T> ? load(p + j) : load_head(p + j, n, T(0));",
        "  return n == kWidth<T> ? load(p + j) : load_head(p + j, 1, T(0));",
        f"{INFO_NCE} tests/ops/test_segment_pool.py -k cpp",
    ),
    Break(
        "worst-kept",
        "cpp",
        "csrc/cpu/top_k.h",
        "if (count_ >= 2 * k_) keep_best();",
        "if (count_ >= 2 * k_) count_ = k_;",
        "tests/ops/test_hard_negatives.py -k cpp",
    ),
    Break(
        "pool-weights-gradient",
        "cpp",
        "csrc/cpu/segment_pool.cpp",
        "mean += double(s.weight(j) * inverse_total) * double(dw[j]);",
        "mean += double(inverse_total) * double(dw[j]);",
        "tests/ops/test_segment_pool.py -k cpp",
    ),
    Break(
        "mixing-gram",
        "cpp",
        "csrc/cpu/mixing.h",
        "across[b * s.k + a] += alpha * beta * v;",
        "",
        "tests/ops/test_mixed_negatives.py -k cpp",
    ),
    Break(
        "group-end",
        "cpp",
        "csrc/cpu/groups.h",
        "const auto [low, high] = std::equal_range(group_.begin(), group_.end(), group);",
        "const auto [low, end] = std::equal_range(group_.begin(), group_.end(), group);\n    const auto high = end - 1;",
        f"{INFO_NCE} -k cpp",
    ),
    Break(
        "own-bias-in-scale",
        "cpp",
        "csrc/cpu/info_nce_row.h",
        "(double(aside.own_logit) - aside.own_bias) * aside.own_share",
        "double(aside.own_logit) * aside.own_share",
        f"{INFO_NCE} -k cpp",
    ),
    Break(
        "further-positives-share",
        "cpp",
        "csrc/cpu/info_nce_one_direction.h",
        "row[column] -= T(weights.shift * share / factor) * factors[column];",
        "(void)column;",
        f"{INFO_NCE} -k cpp",
    ),
    Break(
        "limit-of-own",
        "cpp",
        "csrc/cpu/info_nce_row.h",
        "if (is_excluded || similarity > limit) return;",
        "if (is_excluded) return;",
        f"{RULES} -k 'cpp and weight'",
    ),
    Break(
        "hardness-in-moment",
        "cpp",
        "csrc/cpu/info_nce_row.h",
        "share == 1 ? double(part) : share * double(part) + (share - 1) * double(best) * total",
        "double(part)",
        f"{RULES} -k 'cpp and hard'",
    ),
    Break(
        "largest-with-positive",
        "cpp",
        "csrc/cpu/info_nce_row.h",
        "best = std::max(best, aside.own_logit);",
        "best = std::max({best, T(positive.logit), aside.own_logit});",
        f"{RULES} -k 'cpp and far'",
    ),
    Break(
        "quotient-of-weights",
        "cpp",
        "csrc/cpu/info_nce_one_direction.h",
        "kMostQuotient = 1e15",
        "kMostQuotient = 1e60",
        f"{RULES} -k 'cpp and sizes'",
    ),
    Break(
        "list-without-its-last",
        "cpp",
        "csrc/cpu/info_nce_prepared.h",
        "at < rules.left_out_offsets[i + 1]; ++at",
        "at < rules.left_out_offsets[i + 1] - 1; ++at",
        f"{RULES} -k 'cpp and several'",
    ),
    Break(
        "own-radial",
        "cpp",
        "csrc/cpu/own_negatives.cpp",
        "-factor * s * double(column.factor)",
        "-factor * double(column.factor)",
        f"{RULES} -k 'cpp and own'",
    ),
    Break(
        "block-rows",
        "cpp",
        "csrc/cpu/row_blocks.h",
        "f(first, std::min(rows_, num_rows_ - first));",
        "f(first, rows_);",
        "tests/ops/test_block_edges.py",
    ),
    # --- Triton
    Break(
        "triton-group-mask",
        "triton",
        "kernels/cosine_tile.py",
        "x = tl.where(in_group, FILL, x)",
        "x = tl.where(in_group, x, x)",
        "tests/kernels/test_info_nce.py",
    ),
    Break(
        "triton-list-of-others",
        "triton",
        "kernels/cosine_tile.py",
        "for place in range(0, tl.max(count, axis=0)):",
        "for place in range(0, tl.min(count, axis=0)):",
        "tests/kernels/test_rules.py -k several",
    ),
    Break(
        "triton-last-column",
        "triton",
        "kernels/cosine_tile.py",
        "        counts = (cols < num_cols)[None, :]\n        if ROWS_TOO",
        "        counts = (cols <= num_cols)[None, :]\n        if ROWS_TOO",
        "tests/kernels/test_info_nce.py",
    ),
    Break(
        "triton-positives-shift",
        "triton",
        "kernels/info_nce.py",
        "x * LN_2 - positive_logit[:, None]",
        "x - positive_logit[:, None]",
        "tests/kernels/test_info_nce.py",
    ),
    Break(
        "triton-losses-of-columns",
        "triton",
        "kernels/info_nce.py",
        "share * (weight * 0.5)",
        "share * weight",
        "tests/kernels/test_info_nce.py",
    ),
    Break(
        "triton-log-sums-of-chunks",
        "triton",
        "kernels/info_nce.py",
        "        total += 1.0\n",
        "        total += 0.0\n",
        "tests/kernels/test_info_nce.py",
    ),
    Break(
        "triton-prepared-positive",
        "triton",
        "kernels/rows.py",
        "tl.sum(query * key, axis=1) * inverse * key_inverse, mask=inside",
        "tl.sum(query * key, axis=1) * inverse, mask=inside",
        "tests/kernels/test_info_nce.py",
    ),
    Break(
        "triton-scaled-rows",
        "triton",
        "kernels/info_nce.py",
        "scaled_unit(query, query_inverse, factor)",
        "scaled_unit(query, query_inverse, factor * 1.01)",
        "tests/kernels/test_info_nce.py",
    ),
    Break(
        "triton-pool-weight",
        "triton",
        "kernels/segment_pool.py",
        "        total_weight += weight\n",
        "        total_weight += 1.0\n",
        "tests/kernels/test_segment_pool.py",
    ),
    Break(
        "triton-tiny-rows",
        "triton",
        "kernels/rows.py",
        "tl.where(inverse * floor > 0.999999, 0.0, tl.sum(grad * unit, axis=1))",
        "tl.sum(grad * unit, axis=1)",
        "tests/kernels/test_lengths.py tests/kernels/test_info_nce.py",
    ),
    Break(
        "triton-mixtures",
        "triton",
        "kernels/mixed_negatives.py",
        "parts = tl.sum(weights * weights * squares[None, :], axis=1)",
        "parts = tl.sum(weights * squares[None, :], axis=1)",
        "tests/kernels/test_mixed_negatives.py",
    ),
    # --- modules
    Break(
        "queue-turns",
        "module",
        "hicl_fast/losses/queue.py",
        "kept.clone(), self.pushed % self.size",
        "kept.clone(), 0",
        "tests/losses",
    ),
    Break(
        "queue-in-evaluation",
        "module",
        "hicl_fast/losses/info_nce.py",
        "if self.queue is None or not self.training:",
        "if self.queue is None:",
        "tests/losses",
    ),
    Break(
        "temperature-bound",
        "module",
        "hicl_fast/losses/temperature.py",
        "return log_scale - beyond",
        "return log_scale.clamp_max(bound)",
        "tests/losses/test_temperature.py",
    ),
    Break(
        "pooling-lengths",
        "module",
        "hicl_fast/losses/hicl.py",
        "return pooled, self.pool(segments_positive, offsets, lengths)",
        "return pooled, self.pool(segments_positive, offsets)",
        "tests/losses/test_losses.py",
    ),
    Break(
        "pairs-of-a-row",
        "module",
        "hicl_fast/pairs.py",
        "row = first_row + torch.arange(",
        "row = torch.arange(",
        "tests/test_pairs.py",
    ),
    # --- processes
    Break(
        "gradients-of-others",
        "distributed",
        "hicl_fast/distributed/gathering.py",
        "return _reduce_scatter(gradient, ctx.shares, ctx.ranks).to(ctx.dtype), None, None",
        "return gradient[ctx.shares.slices[ctx.ranks.rank]].to(ctx.dtype), None, None",
        "tests/distributed/test_losses.py",
    ),
    Break(
        "unequal-shares",
        "distributed",
        "hicl_fast/distributed/info_nce.py",
        "ranks.size * shares.own / shares.total",
        "1.0",
        "tests/distributed/test_losses.py",
    ),
    Break(
        "ring-share",
        "distributed",
        "hicl_fast/distributed/ring.py",
        "lse_grad * torch.exp(one_lse - lse))",
        "lse_grad)",
        "tests/distributed/test_losses.py -k ring",
    ),
    # --- trainer
    Break(
        "chunks-dropout",
        "trainer",
        "hicl_fast/trainer/gradient_cache.py",
        "state.replayed(), torch.autocast(*ctx.autocast)",
        "torch.autocast(*ctx.autocast)",
        "tests/trainer/test_gradient_cache.py -k 'not slow'",
    ),
    Break(
        "paper-ratio",
        "trainer",
        "hicl_fast/trainer/paradigm.py",
        'PAPER_RATIO.get(args.objective, 1.0) if "r" in modified else 1.0',
        "1.0",
        "tests/trainer/test_paradigm.py",
    ),
)


def misfit(one: Break, root: Path = ROOT) -> str:
    """Why a break can't be applied; empty where it can."""
    path = root / one.file
    count = path.read_text().count(one.old) if path.exists() else 0
    return "" if count == 1 else f"{one.file}: expected the old text once, found it {count} times"


def copy_of_the_checkout(folder: Path) -> None:
    """Its files, what is compiled, and what compiling has left behind, so that little has to be compiled again."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    compiled = [path.relative_to(ROOT).as_posix() for path in (ROOT / "hicl_fast").glob("_C*.so")]
    for name in [*listed, *compiled]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for objects in (ROOT / "build").glob("temp*"):
        shutil.copytree(objects, folder / "build" / objects.name)
    (folder / "hicl_fast" / "kernels").symlink_to("../kernels")  # as it is installed
    data = os.environ.get("HICL_FAST_DATA", ROOT.parent / "shared" / "data")
    os.environ.setdefault("HICL_FAST_DATA", str(data))


def attempt(one: Break, folder: Path) -> Seen:
    """Apply a break in a copy of the checkout, run its tests there, and undo it."""
    started = time.monotonic()
    if problem := misfit(one, folder):
        return Seen(one.name, one.layer, [], 0, 0.0, problem)
    path = folder / one.file
    whole = path.read_text()
    path.write_text(whole.replace(one.old, one.new))
    try:
        problem = _compile(folder) if one.layer == "cpp" else ""
        by, num_passed = ([], 0) if problem else _run_tests(one, folder)
    finally:
        path.write_text(whole)
        if one.layer == "cpp":
            _compile(folder)
    return Seen(one.name, one.layer, by, num_passed, time.monotonic() - started, problem)


def _compile(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "HICL_FAST_BUILD": "require"},
    )  # fmt: skip
    return "" if done.returncode == 0 else f"it doesn't compile: {done.stderr[-400:]}"


def _run_tests(one: Break, folder: Path) -> tuple[list[str], int]:
    """The tests that failed, and how many passed."""
    interpreted = one.layer == "triton"
    marks = "interpret" if interpreted else "not interpret and not slow"
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": str(int(interpreted))}
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider -n 2 -m '{marks}' {one.tests}"
    try:
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return [f"no end within {TIMEOUT} s"], 0
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::\S+)", done.stdout, re.MULTILINE)  # not what can't even be loaded
    passed = re.search(r"(\d+) passed", done.stdout)
    return failed, int(passed[1]) if passed else 0


def table(found: Sequence[Seen]) -> str:
    lines = [f"{'break':<24}{'layer':<13}{'failed':>7}{'passed':>8}{'seconds':>9}  first to see it"]
    for one in found:
        first = one.problem or (one.by[0] if one.by else "NOBODY SAW IT")
        lines.append(
            f"{one.name:<24}{one.layer:<13}{len(one.by):>7}{one.num_passed:>8}{one.seconds:>9.0f}  {first[:90]}"
        )
    seen = sum(one.is_seen for one in found)
    return "\n".join([*lines, f"{seen} of {len(found)} breaks are seen"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.breaks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="BREAK", help="those to try; default: all")
    parser.add_argument("--layer", choices=sorted({one.layer for one in BREAKS}), help="those of one layer")
    parser.add_argument("--list", action="store_true", help="name them, and try none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of them")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - {one.name for one in BREAKS}:
        parser.error(f"expected names that --list gives, got {', '.join(sorted(unknown))}")
    chosen = [one for one in BREAKS if (not args.names or one.name in args.names) and args.layer in (None, one.layer)]
    if args.list:
        print("\n".join(f"{one.name:<24}{one.layer:<13}{one.file}" for one in chosen))
        return 0
    found: list[Seen] = []
    with tempfile.TemporaryDirectory(prefix="hicl_fast-breaks-") as name:
        copy_of_the_checkout(Path(name))
        for one in chosen:
            found.append(attempt(one, Path(name)))
            print(f"{one.name}: {'seen' if found[-1].is_seen else 'NOT SEEN'}", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False) + "\n")
    print(table(found))
    return 0 if all(one.is_seen for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
