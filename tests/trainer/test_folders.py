"""Folders that sentence-transformers wrote, encoders of other families, and padding on either side."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hicl_fast import mine
from hicl_fast.analysis.embeddings import views_of_model
from hicl_fast.evaluation import __main__ as evaluation
from hicl_fast.evaluation import spearman
from hicl_fast.trainer.cli import main, train
from hicl_fast.trainer.encoder import SentenceEncoder
from hicl_fast.trainer.model import load_encoder, load_tokenizer, max_tokens
from hicl_fast.trainer.scratch import train_tokenizer
from hicl_fast.trainer.slicing import slice_documents
from hicl_fast.trainer.token_pooling import POOLERS, embed
from tests.trainer.conftest import WORDS, make_documents

TEXTS = [*make_documents(5, (1, 9), seed=3), "KALA Morem", "kala morem", "vina " * 40]
SIZES: dict[str, Any] = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT: dict[str, Any] = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 64}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**BERT),
    "roberta": lambda: transformers.RobertaConfig(
        **{**BERT, "max_position_embeddings": 33}, pad_token_id=0
    ),  # counts from 1
    "t5": lambda: transformers.T5Config(
        vocab_size=200, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, decoder_start_token_id=0
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=200,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=200, n_embd=16, n_layer=2, n_head=2, n_positions=64),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A transformers folder of random weights, by family."""
    tokenizer = train_tokenizer([*WORDS] * 3)

    def build(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "models" / family
        if not folder.exists():
            torch.manual_seed(0)
            config = CONFIGS[family]()
            model = transformers.AutoModel.from_config(config)
            for matrix in (parameter for parameter in model.parameters() if parameter.dim() > 1):
                torch.nn.init.normal_(matrix, std=0.3)  # so that texts lie far apart
            model.save_pretrained(folder)
            tokenizer.model_max_length = 10**30 if family in ("roberta", "t5") else 64
            tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def written(plain: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A folder that sentence-transformers saves, of a Transformer and what follows it."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    def build(
        pooling: Any = "mean", *, family: str = "bert", more: Any = (), model: Any = None, **transformer: Any
    ) -> Path:
        torch.manual_seed(1)
        first = models.Transformer(str(plain(family)), **transformer)
        pool = pooling if isinstance(pooling, models.Pooling) else models.Pooling(16, pooling_mode=pooling)
        modules = [first, pool, *(make(models) for make in more)]
        st.SentenceTransformer(modules=modules, device="cpu", **(model or {})).save(
            str(tmp_path / "st"), create_model_card=False
        )
        return tmp_path / "st"

    return build


def theirs(folder: Path, texts: list[str] = TEXTS) -> Tensor:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)


def ours(folder: Path, texts: list[str] = TEXTS, **options: Any) -> Tensor:
    return SentenceEncoder.from_pretrained(folder, device="cpu", **options).encode(texts)


def assert_same(folder: Path) -> None:
    expected = theirs(folder)
    assert expected.std(dim=0).mean() > 1e-3
    torch.testing.assert_close(ours(folder), expected, rtol=1e-6, atol=1e-6)


def dense(models: Any) -> Any:
    return models.Dense(16, 5, activation_function=torch.nn.GELU())


def normalize(models: Any) -> Any:
    return models.Normalize()


def layer_norm(models: Any) -> Any:
    return models.LayerNorm(16)


def shown(arguments: dict[str, Any]) -> str:
    """A test's name: of functions their own, and no address, which would be another in each process."""
    more = [getattr(make, "__name__", "") for make in arguments.get("more", [])]
    return " ".join(f"{name}={more if name == 'more' else value}" for name, value in arguments.items())


@pytest.mark.parametrize(
    "arguments",
    [
        *({"pooling": mode} for mode in ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")),
        {"pooling": ("mean", "cls", "max")},
        {"more": [dense, normalize]},
        {"more": [layer_norm]},
        {"max_seq_length": 5},
        {"do_lower_case": True},
        {"model": {"prompts": {"query": "kala: ", "other": "vina "}, "default_prompt_name": "query"}},
        {"pooling": "lasttoken", "family": "gpt2"},
        {"family": "t5"},
        {"family": "roberta", "max_seq_length": 32},
    ],
    ids=shown,
)
def test_embeddings_are_those_of_sentence_transformers(written: Callable[..., Path], arguments: dict[str, Any]) -> None:
    assert_same(written(**arguments))


def test_a_prompt_that_pooling_leaves_out(written: Callable[..., Path]) -> None:
    models = pytest.importorskip("sentence_transformers.models")
    pooling = models.Pooling(16, pooling_mode="mean", include_prompt=False)
    assert_same(written(pooling, model={"prompts": {"query": "kala: "}, "default_prompt_name": "query"}))


def test_as_old_releases_wrote_it(written: Callable[..., Path]) -> None:
    """The Transformer in a folder of its own, pooling modes as switches."""
    folder = written("max")
    (folder / "0_Transformer").mkdir()
    for path in [*folder.glob("*token*"), *folder.glob("*.safetensors"), folder / "config.json"]:
        shutil.move(path, folder / "0_Transformer" / path.name)
    (folder / "sentence_bert_config.json").unlink()
    settings = {"max_seq_length": 9, "do_lower_case": False}
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps(settings))
    modes = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**modes, "pooling_mode_mean_tokens": False}))
    kinds = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    content = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(content))
    assert_same(folder)
    assert ours(folder, pooler_type="avg").shape == (len(TEXTS), 16)  # the encoder is found there too


def test_a_pooler_type_overrides_in_words(written: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = written("max", more=[dense])
    with caplog.at_level(logging.WARNING):
        rows = ours(folder, pooler_type="avg")
    assert (
        "avg pooling of the Transformer alone, as asked, in place of its own Transformer, Pooling, Dense" in caplog.text
    )
    encoder, tokenizer = load_encoder(folder, "avg")[0].eval(), load_tokenizer(folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        tokens = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    torch.testing.assert_close(rows, (tokens * mask).sum(1) / mask.sum(1), rtol=1e-5, atol=1e-6)


def test_evaluation_and_mining_open_the_folder_so(
    tmp_path: Path, written: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written("cls", more=[dense])
    first, second = TEXTS[:4], TEXTS[4:8]
    path = tmp_path / "senteval" / "STS" / "STSBenchmark" / "sts-dev.csv"
    path.parent.mkdir(parents=True)
    rows = zip(range(1, 5), first, second, strict=True)
    path.write_text("".join(f"g\tf\ty\t0\t{gold}\t{one}\t{other}\n" for gold, one, other in rows))
    options = ["--model_name_or_path", str(folder), "--device", "cpu"]
    evaluation.main([*options, "--data_dir", str(tmp_path / "senteval"), "--tasks", "STS-B dev"])
    similarity = torch.cosine_similarity(theirs(folder, first).double(), theirs(folder, second).double())
    expected = 100 * spearman(similarity, torch.arange(4.0))
    printed = capsys.readouterr().out
    assert f"| {expected:.2f} |" in printed and "Transformer, Pooling, Dense of sentence-transformers" in printed

    for name, lines in (("query", TEXTS[:1]), ("corpus", TEXTS[1:6])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    files = ["--query", str(tmp_path / "query.txt"), "--corpus", str(tmp_path / "corpus.txt"), "--k", "5"]
    mine.main([*options, *files, "--output", str(tmp_path / "out.jsonl")])
    mined = list(json.loads((tmp_path / "out.jsonl").read_text()).values())[2:]
    similarity = torch.cosine_similarity(theirs(folder, TEXTS[:1]), theirs(folder, TEXTS[1:6]))
    assert mined == [TEXTS[1:6][column] for column in similarity.argsort(descending=True)]


def test_options_of_length(written: Callable[..., Path]) -> None:
    from sentence_transformers import SentenceTransformer

    folder = written("max", family="roberta", max_seq_length=33)  # one more than there are positions
    assert ours(folder).shape == (len(TEXTS), 16)
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 6
    encoder = SentenceEncoder.from_pretrained(folder, device="cpu", max_seq_length=6)
    torch.testing.assert_close(encoder.encode(TEXTS), model.encode(TEXTS, convert_to_tensor=True), rtol=1e-6, atol=1e-6)
    assert encoder.description == "Transformer, Pooling of sentence-transformers, at most 6 tokens"
    with pytest.raises(ValueError, match="max_seq_length: expected 1 to 32 tokens, .* got 33"):
        SentenceEncoder.from_pretrained(folder, max_seq_length=33)
    with pytest.raises(ValueError, match="segment_length: expected none with a sentence-transformers folder"):
        SentenceEncoder.from_pretrained(folder, segment_length=8)


def test_without_the_library(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written("max")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"need that library: pip install 'hicl-fast\[sentence-transformers\]'"):
        ours(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mine.Evil", "modules of sentence-transformers alone .* got 'mine.Evil'"),
        ("os.system", "modules of sentence-transformers alone"),
        (None, "a list of modules"),
    ],
)
def test_code_that_comes_with_a_model_is_not_run(
    plain: Callable[[str], Path], tmp_path: Path, kind: str, message: str
) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(plain("bert"), folder)
    (folder / "mine.py").write_text("raise SystemExit('run')\n")
    entry = {"idx": 0, "name": "0", "path": "", "type": kind}
    (folder / "modules.json").write_text(json.dumps([entry] if kind else {"a": 1}))
    for open_it in (ours, lambda folder: ours(folder, pooler_type="avg"), load_encoder):
        with pytest.raises(ValueError, match=message):
            open_it(folder)


@pytest.mark.parametrize("pooler_type", sorted(POOLERS))
def test_padding_on_either_side_changes_nothing(plain: Callable[[str], Path], pooler_type: str) -> None:
    model, tokenizer = load_encoder(plain("bert"), pooler_type)[0].eval(), load_tokenizer(plain("bert"))
    with torch.no_grad():
        alone = torch.cat([embed(model, *slice_documents(tokenizer, [text], 64, 1)[:2], pooler_type) for text in TEXTS])
        for side in ("left", "right"):
            tokenizer.padding_side = side
            batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
            rows = embed(model, batch["input_ids"], batch["attention_mask"], pooler_type)
            torch.testing.assert_close(rows, alone, rtol=1e-5, atol=1e-5)
            rows = SentenceEncoder(model, tokenizer, pooler_type).encode(TEXTS)
            torch.testing.assert_close(rows, alone, rtol=1e-5, atol=1e-5)


def test_positions_that_are_there(plain: Callable[[str], Path]) -> None:
    lengths = {}
    for family in ("bert", "roberta", "gpt2", "t5"):
        model, _ = load_encoder(plain(family), "avg")
        lengths[family] = max_tokens(model, load_tokenizer(plain(family)))
    assert lengths == {"bert": 64, "roberta": 32, "gpt2": 64, "t5": 2**31 - 1}
    assert ours(plain("roberta"), ["kala " * 100], pooler_type="avg").isfinite().all()


@pytest.mark.parametrize(
    ("family", "pooler_type"), [("t5", "avg"), ("gpt2", "last_token"), ("roberta", "cls_before_pooler")]
)
def test_trained_folders_of_other_families(
    tmp_path: Path,
    sentences: Path,
    command: Callable[..., list[str]],
    plain: Callable[[str], Path],
    family: str,
    pooler_type: str,
) -> None:
    pytest.importorskip("sentence_transformers")
    start = tmp_path / "start"
    shutil.copytree(plain(family), start)
    settings = json.loads((start / "tokenizer_config.json").read_text())
    (start / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    train(command(sentences, model_name_or_path=start, pooler_type=pooler_type, max_steps=1, max_seq_length=16))
    assert_same(tmp_path / "run")


def test_encoder_and_decoder_in_one_is_refused(plain: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="model_name_or_path: expected an encoder, got 'bart' .* an encoder-decoder"):
        load_encoder(plain("bart"))


def test_training_goes_on_with_the_folders_own_pooling(
    tmp_path: Path, sentences: Path, command: Callable[..., list[str]], written: Callable[..., Path]
) -> None:
    folder = written("mean", more=[lambda models: models.Normalize()])
    arguments = command(sentences, model_name_or_path=folder, max_steps=1, learning_rate=1e-9)
    at = arguments.index("--pooler_type")
    del arguments[at : at + 2]
    train(arguments)
    rows = torch.nn.functional.normalize(ours(tmp_path / "run"))
    torch.testing.assert_close(rows, theirs(folder), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sentence_pooling"] == "avg"


@pytest.mark.parametrize(
    "arguments",
    [
        {"pooling": "max"},
        {"more": [dense]},
        {"model": {"prompts": {"query": "kala: "}, "default_prompt_name": "query"}},
    ],
    ids=shown,
)
def test_modules_that_the_trainer_lacks_are_not_left_out_silently(
    sentences: Path, command: Callable[..., list[str]], written: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    folder = written(**arguments)
    assert_not_trained(folder, sentences, command)


def test_lower_casing_as_old_releases_recorded_it(
    sentences: Path, command: Callable[..., list[str]], written: Callable[..., Path]
) -> None:
    folder = written("mean")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": true}')
    assert_not_trained(folder, sentences, command)


def assert_not_trained(folder: Path, sentences: Path, command: Callable[..., list[str]]) -> None:
    options = command(sentences, model_name_or_path=folder)
    at = options.index("--pooler_type")
    del options[at : at + 2]
    with pytest.raises(SystemExit, match="error: pooler_type: expected the pooling to go on with"):
        main(options)
    with pytest.raises(ValueError, match="pooler_type: expected the pooling"):
        views_of_model(str(folder), str(sentences), 8)


def test_the_trainers_own_folder_needs_no_library(
    tmp_path: Path, sentences: Path, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until sentence-transformers has saved it again, with another module."""
    st = pytest.importorskip("sentence_transformers")
    train(command(sentences, max_steps=1))
    settings = tmp_path / "run" / "sentence_bert_config.json"
    settings.write_text(json.dumps({"max_seq_length": 7, "do_lower_case": False}))
    expected = theirs(tmp_path / "run")
    model = st.SentenceTransformer(str(tmp_path / "run"), device="cpu")
    model.append(st.models.Normalize())
    model.save(str(tmp_path / "again"), create_model_card=False)
    assert_same(tmp_path / "again")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    torch.testing.assert_close(ours(tmp_path / "run"), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="need that library"):
        ours(tmp_path / "again")


def test_nothing_is_left_of_an_earlier_model(
    tmp_path: Path, sentences: Path, command: Callable[..., list[str]], written: Callable[..., Path]
) -> None:
    """Its modules and prompts would be the new one's to whoever opens the folder."""
    folder = written("mean", model={"prompts": {"query": "kala: "}, "default_prompt_name": "query"})
    for pooler_type, left in (("cls_before_pooler", {"modules.json"}), ("avg_top2", set())):
        options = {"model_name_or_path": folder, "pooler_type": pooler_type, "max_steps": 1}
        train(command(sentences, "st", **options))  # where it was read from
        assert {path.name for path in folder.glob("*.json")} & {
            "modules.json",
            "config_sentence_transformers.json",
        } == left
        assert SentenceEncoder.from_pretrained(folder).description.startswith(f"{pooler_type} pooling")
