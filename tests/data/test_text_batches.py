"""Token ids and batches: special tokens once, no text cut or padded to fit others."""

import pytest
import torch
from datasets import Dataset
from loguru import logger
from support.samples import save_texts
from support.tiny_models import save_tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from casp_plugin import cli, plan_recipe
from casp_plugin.data.sources import load_text
from casp_plugin.data.text_batches import calibration_loader
from casp_plugin.data.tokens import begins_by_itself, most_tokens, token_ids
from casp_plugin.evaluation.text import evaluate

TURNS = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]


def tokenizer_that_adds(folder, before="", after="", template=None):
    """A tokenizer that adds words of its vocabulary to every text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    added = f"{before} {after}".split()
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(added))})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A {after}".strip(),
        special_tokens=[(word, tokenizer.convert_tokens_to_ids(word)) for word in set(added)],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("before", "after", "text", "ids"),
    [
        ("<s>", "", "w5 w6", [1, 5, 6]),
        ("<s>", "", "<s>w5 w6", [1, 5, 6]),
        ("<s>", "", "<s><s>w5", [1, 1, 5]),  # as the text has it
        ("<s>", "", "<s>", [1]),
        ("<s>", "", "w5<s>", [1, 5, 1]),
        ("w8 w9", "", "w5", [8, 9, 5]),
        ("w8 w9", "", "w8 w9 w5", [8, 9, 5]),
        ("w8 w9", "", "w9 w5", [8, 9, 5]),
        ("w8 w9", "", "w8 w5", [8, 9, 8, 5]),
        ("", "</s>", "w5 w6", [5, 6, 2]),
        ("", "</s>", "w5 w6</s>", [5, 6, 2]),
        ("<s>", "</s>", "<s>w5", [1, 5, 2]),
        ("<s>", "</s>", "w5</s>", [1, 5, 2]),
        ("<s>", "</s>", "<s>w5</s>", [1, 5, 2]),
        ("<s>", "", "", []),
        ("", "", "<s>w5", [1, 5]),
        ("", "", "", []),
    ],
)
def test_special_tokens_come_once(tiny_llama, before, after, text, ids):
    tokenizer = tokenizer_that_adds(tiny_llama, before, after)
    assert token_ids(text, tokenizer) == ids


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("limit", [2, 3, 5, 9])
def test_cut_as_the_tokenizer_cuts(tiny_llama, side, limit):
    tokenizer = tokenizer_that_adds(tiny_llama, "<s>", "</s>")
    tokenizer.truncation_side = side
    text = "w5 w6 w7 w8"
    cut = tokenizer(text, truncation=True, max_length=limit).input_ids
    assert token_ids(text, tokenizer, limit) == cut
    assert token_ids(f"<s>{text}</s>", tokenizer, limit) == cut


def test_begins_by_itself(tiny_llama):
    tokenizer = tokenizer_that_adds(tiny_llama, "w8 w9", "</s>")
    assert begins_by_itself("w8 w9 w5", tokenizer)
    assert not begins_by_itself("w9 w5", tokenizer)
    assert not begins_by_itself("w5", AutoTokenizer.from_pretrained(tiny_llama))


@pytest.mark.parametrize(
    "template",
    ["{{ bos_token }}" + TURNS, TURNS, "w8 w9 " + TURNS, "{{ bos_token }}" + TURNS + "</s>"],
    ids=["bos", "none", "prefix", "both"],
)
@pytest.mark.parametrize(
    ("before", "after"), [("<s>", ""), ("", ""), ("w8 w9", ""), ("<s>", "</s>"), ("", "</s>")]
)
def test_ids_of_chats_are_those_of_the_template(
    tiny_llama, load_tiny, tmp_path, template, before, after
):
    """In calibration and in evaluation; and in a column of texts that a template wrote."""
    tokenizer = tokenizer_that_adds(tiny_llama, before, after, template)
    wanted = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    Dataset.from_dict({"messages": [CHAT]}).to_parquet(tmp_path / "a.parquet")
    texts = load_text(str(tmp_path / "a.parquet"), tokenizer, 5)
    [batch] = calibration_loader(texts, tokenizer, 32)
    assert batch["input_ids"].tolist() == [wanted]
    assert batch["attention_mask"].tolist() == [[1] * len(wanted)]
    [short] = calibration_loader(texts, tokenizer, 3)
    assert short["input_ids"].tolist() == [wanted[:3]]
    model, seen = load_tiny(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    evaluate(model, tokenizer, texts["text"], 32, add_special_tokens=False)
    assert seen == [[wanted]]
    [written] = calibration_loader(texts.select_columns("text"), tokenizer, 32)
    evaluate(model, tokenizer, texts["text"], 32)
    assert written["input_ids"].tolist() == seen[1]
    for word in (1, 8, 2):
        assert seen[1][0].count(word) <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batches_hold_all_of_all_texts(tiny_llama, batch_size):
    tokenizer = tokenizer_that_adds(tiny_llama, "<s>")
    lengths = [3, 9, 3, 5, 3, 5, 1, 3, 3]
    texts = [" ".join(f"w{i + j + 3}" for j in range(n)) for i, n in enumerate(lengths)]
    found = list(calibration_loader(Dataset.from_dict({"text": texts}), tokenizer, 8, batch_size))
    rows = [row for batch in found for row in batch["input_ids"].tolist()]
    assert sorted(rows) == sorted(tokenizer(text).input_ids[:8] for text in texts)
    assert all(batch["attention_mask"].all() for batch in found)
    assert [len(row) for row in rows] == sorted(map(len, rows), reverse=True)
    sizes = {1: [1] * 9, 2: [1, 2, 2, 2, 1, 1], 4: [1, 2, 4, 1, 1]}
    assert [len(batch["input_ids"]) for batch in found] == sizes[batch_size]
    again = calibration_loader(Dataset.from_dict({"text": texts}), tokenizer, 8, batch_size)
    assert [batch["input_ids"].tolist() for batch in again] == [
        batch["input_ids"].tolist() for batch in found
    ]


def test_texts_without_tokens_are_counted(tiny_llama, load_tiny):
    tokenizer = tokenizer_that_adds(tiny_llama, "<s>")
    texts = Dataset.from_dict({"text": ["w5 w6", "\u2028", "w7 w8"]})
    found = []
    handle = logger.add(lambda message: found.append(str(message)), level="WARNING")
    try:
        assert len(list(calibration_loader(texts, tokenizer, 8))) == 2
        assert "1 of 3 texts left out: they have no tokens" in found[-1]
        assert evaluate(load_tiny(), tokenizer, texts["text"], 8).tokens == 4
        assert "1 texts left out" in found[-1]
    finally:
        logger.remove(handle)
    with pytest.raises(ValueError, match="0 of 1 texts have tokens"):
        calibration_loader(texts.select([1]), tokenizer, 8)


@pytest.mark.parametrize(
    ("family", "fields", "most"),
    [
        ("opt", {"max_position_embeddings": 48}, 48),
        ("gpt2", {"n_positions": 48}, 48),
        ("gptj", {"n_positions": 48}, 48),
        ("llama", {"max_position_embeddings": 48}, 48),
        ("llava", {"text_config": {"model_type": "llama", "max_position_embeddings": 48}}, 48),
        ("whisper", {"max_target_positions": 48}, 48),
        ("falcon", {"max_position_embeddings": 48}, 48),
        ("falcon", {"max_position_embeddings": 48, "alibi": True}, None),
        ("bloom", {}, None),
        ("mpt", {}, 2048),  # its ALiBi is made for so many
        ("mamba", {}, None),
        ("xlnet", {}, None),
    ],
)
def test_positions_of_families(family, fields, most):
    assert most_tokens(AutoConfig.for_model(family, **fields)) == most


OPT = {"ffn_dim": 64, "max_position_embeddings": 16, "word_embed_proj_dim": 64}
RECIPE = """
casp_stage:
  casp_modifiers:
    BitAllocationModifier: {average_bits: 5, candidates: [2, 3, 4, 8], group_size: 16}
    GPTQModifier: {}
"""


@pytest.fixture
def opt(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    save_texts(tmp_path / "data.jsonl")  # of 24 tokens
    return save_tiny_model(tmp_path / "opt", "opt", **OPT)


def test_max_length_beyond_the_positions(opt, tmp_path):
    """The model's own limit, said once by each command; in ``run`` with several texts a batch."""
    data = ["--dataset", tmp_path / "data.jsonl"]
    recipe = ["--recipe", tmp_path / "recipe.yaml"]
    for command in (
        ["plan", opt, *recipe, *data],
        ["run", opt, *recipe, *data, "--output", tmp_path / "out", "--batch-size", 3],
        ["eval", opt, *data, "--reference", opt],
    ):
        result = CliRunner().invoke(cli.app, list(map(str, command)))
        assert result.exit_code == 0, (command, result.output, result.exception)
        told = "--max-length 2048 is more than the 16 positions that the model (opt) has: 16 it is"
        assert result.output.count(told) == 1, command


@pytest.mark.parametrize(
    ("command", "more"), [("sweep", ["--average-bits", 5]), ("sensitivity", [])]
)
def test_max_length_of_studies(opt, tmp_path, monkeypatch, command, more):
    """What they calibrate and score with; stopped before a model is made."""
    seen = {}

    def begin(folder, facts, *args, **kwargs):
        seen.update(facts)
        raise KeyboardInterrupt

    monkeypatch.setattr("casp_plugin.evaluation.study_folder.begin", begin)
    data = ["--dataset", tmp_path / "data.jsonl", "--heldout", tmp_path / "data.jsonl"]
    if command == "sweep":
        more = [*more, "--recipe", tmp_path / "recipe.yaml"]
    else:
        more = ["--group-size", 16]
    arguments = [command, opt, *data, *more, "--output", tmp_path / "out"]
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert seen.get("max_length") == 16, (result.output, result.exception)
    assert result.output.count("has: 16 it is") == 1


def test_batches_change_nothing(tmp_path):
    """Errors of bit widths are those that the texts one by one lead to."""
    recipe = RECIPE.replace("average_bits", "importance: uniform, average_bits")
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "model"))
    texts = [" ".join(f"w{(i * 5 + j) % 90 + 3}" for j in range(4 + i % 3)) for i in range(9)]
    texts = Dataset.from_dict({"text": texts})
    plans = []
    for size in (1, 4):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        plans.append(plan_recipe(model, recipe, calibration_loader(texts, tokenizer, 32, size)))
    one, several = (
        [candidate.error for unit in plan.units for candidate in unit.candidates] for plan in plans
    )
    assert one == pytest.approx(several, rel=5e-3)
