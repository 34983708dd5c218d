"""Text from files and folders of all kinds: nothing is lost without a word, and what is wrong is
told with its row or line."""

import json

import pytest
from datasets import Dataset, DatasetDict
from loguru import logger
from PIL import Image
from support.tiny_models import save_tiny_model
from transformers import AutoTokenizer

from casp_plugin.data.conversations import load_conversations
from casp_plugin.data.sources import adds_special_tokens, load_text, read_source

CHATML = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}{{ eos_token }}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)
IN_PARTS = (
    "{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ m['role'] + ' ' + c['text'] + ' ' }}{% endfor %}{% endfor %}{{ eos_token }}"
)
CHAT = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
WRITTEN = "user w3 assistant w4 </s>"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tokenizer without a chat template."""
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def tokenizer(plain, monkeypatch):
    monkeypatch.setattr(plain, "chat_template", CHATML)
    return plain


@pytest.fixture
def warnings():
    """What is logged as a warning."""
    found = []
    handle = logger.add(lambda message: found.append(str(message)), level="WARNING")
    yield found
    logger.remove(handle)


def save_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def texts_of(source, tokenizer=None, **more):
    return sorted(load_text(str(source), tokenizer, 100, **more)["text"])


@pytest.mark.parametrize("name", ["data [v2]", "a*b", "q?x", "br{a,b}", "[!a]", "x]y["])
def test_folders_named_like_patterns(tmp_path, name):
    """And not what else the pattern would find."""
    for folder in (name, "data v", "aXb", "qyx", "b"):
        (tmp_path / folder).mkdir()
        word = "w3" if folder == name else "other"
        data = Dataset.from_dict({"text": [word, "w4"]})
        data.to_json(tmp_path / folder / "a.jsonl")
        data.to_csv(tmp_path / folder / "a.csv")
        data.to_parquet(tmp_path / folder / "a.parquet")
        data.save_to_disk(tmp_path / folder / "disk")
        (tmp_path / folder / "a.txt").write_text(f"{word}\n\nw4")
        images = tmp_path / folder / "images"
        images.mkdir()
        Image.new("RGB", (4, 4)).save(images / "1.png")
        row = {"file_name": "1.png", "question": word, "answer": "w4"}
        save_rows(images / "metadata.jsonl", [row])
    for file in ("a.jsonl", "a.csv", "a.parquet", "a.txt", "disk"):
        assert texts_of(tmp_path / name / file) == ["w3", "w4"], file
    [shown] = load_conversations(str(tmp_path / name / "images"), 5)
    assert (shown.question, len(shown.images)) == ("w3", 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "w3"}\n{"text": "caf\xe9"}'.encode("latin-1"), "line 2 is not UTF-8"),
        ("a.json", '[{"text": "caf\xe9"}]'.encode("latin-1"), "line 1 is not UTF-8"),
        ("a.csv", "text\nw3\ncaf\xe9\n".encode("latin-1"), "line 3 is not UTF-8"),
        ("a.csv", "text\nw3\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("a.txt", "w3\n\ncaf\xe9\n".encode("latin-1"), "line 3 is not UTF-8"),
        ("a.jsonl", b'{"text": "w3"}\n{"text": "w4"\n', "line 2 is no JSON: Expecting ','"),
        ("a.jsonl", b'{"text": "w3"}\n\nhello\n', "line 3 is no JSON"),
        ("a.jsonl", b'["w3"]\n["w4"]\n', "no JSON"),
        ("a.jsonl", b'"w3"\n"w4"\n', r"line 1 holds 'w3', not a table \{column: value\}"),
        ("a.json", b'[{"text": "w3"},\n {"text": }]\n', "line 2 is no JSON"),
        ("a.csv", b"id,text\n1,w3\n2,w4,w5,w6\n", "Expected 2 fields in line 3, saw 4"),
        ("a.parquet", b"hello", "Parquet"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n", "the file has no rows"),
        ("a.json", b"[]", "the file has no rows"),
        ("a.csv", b"text\n", "the file has no rows"),
        ("a.tsv", b"text\nw3\n", r"kind '\.tsv' is not read; those that are: \.jsonl, "),
        ("a.csv", b"text\n3\n4\n", r"row 1, column 'text': it holds 3, not text"),
        ("a.jsonl", b'{"text": "w3"}\n{"text": 4}', "row 2, column 'text': it holds 4, not text"),
        ("a.jsonl", b'{"text": null}\n{"text": 0.5}', "row 2, column 'text': it holds 0.5, not"),
        ("a.jsonl", b'{"text": {"a": "w3"}}', r"row 1, column 'text': it holds \{'a': 'w3'\}, not"),
        ("a.jsonl", b'{"text": [], "messages": []}', "holds no text in column 'text'"),
        ("a.jsonl", b'{"text": null}', "holds no text in column 'text'"),
    ],
)
def test_files_with_something_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_text(str(path), None, 5)
    assert str(path) in str(caught.value)


def test_a_table_about_images_in_another_encoding(tmp_path):
    row = '{"file_name": "1.png", "question": "caf\xe9", "answer": "w3"}'
    (tmp_path / "metadata.jsonl").write_bytes(row.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1 is not UTF-8"):
        load_conversations(str(tmp_path), 5)


def test_files_that_are_read(tmp_path):
    """Marks of byte order, blank lines, suffixes in capitals, cells that say NA."""
    for name, content in {
        "a.jsonl": '\ufeff{"text": "w3"}\n\n{"text": "NA"}\n',
        "b.JSONL": '{"text": "w3"}\r\n{"text": "NA"}\r\n',
        "a.txt": "\ufeffw3\n\nNA",
        "a.csv": '\ufefftext\nw3\nNA\n""\n',
        "a.json": '[{"text": "w3"},\n{"text": "NA"}]',
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert texts_of(tmp_path / name) == ["NA", "w3"], name


def test_splits_that_there_are(tmp_path):
    data = Dataset.from_dict({"text": ["w3"]})
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "disk")
    assert len(read_source(str(tmp_path / "disk"), "test")) == 1
    with pytest.raises(ValueError, match=r"disk' \(split 'val'\): its splits are train, test"):
        read_source(str(tmp_path / "disk"), "val")


def test_rows_without_text_are_counted(tmp_path, tokenizer, warnings):
    rows = [{"text": text} for text in ("w3", "", "  ", None, "w4")]
    assert texts_of(save_rows(tmp_path / "a.jsonl", rows)) == ["w3", "w4"]
    assert "3 of 5 rows of dataset" in warnings[-1]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["w3", "w4"]
    chats = save_rows(tmp_path / "b.jsonl", [{"messages": m} for m in ([], CHAT, None)])
    assert texts_of(chats, tokenizer) == [WRITTEN]
    assert "2 of 3 rows of dataset" in warnings[-1]
    assert len(warnings) == 3


def test_questions_without_words_are_counted(tmp_path, warnings):
    rows = [{"image": None, "question": q, "answer": a} for q, a in [("w3", "w4"), (None, " ")]]
    assert len(load_conversations(save_rows(tmp_path / "a.jsonl", rows), 5)) == 1
    assert "1 of 2 rows of dataset" in warnings[-1]


@pytest.mark.parametrize("column", ["messages", "conversations", "dialog"])
@pytest.mark.parametrize(
    "chat",
    [
        CHAT,
        [{"from": "human", "value": "w3"}, {"from": "gpt", "value": "w4"}],
        [{"from": "user", "value": "w3"}, {"from": "assistant", "value": "w4"}],
        [{"role": "user", "content": [{"type": "text", "text": "w3"}]}, CHAT[1]],
    ],
    ids=["roles", "sharegpt", "sharegpt roles", "parts"],
)
@pytest.mark.parametrize("template", [CHATML, IN_PARTS], ids=["strings", "parts"])
def test_chats(tmp_path, tokenizer, monkeypatch, column, chat, template):
    """Under both names, in both forms, for templates that read strings and those that read parts
    alone."""
    monkeypatch.setattr(tokenizer, "chat_template", template)
    source = save_rows(tmp_path / "a.jsonl", [{"id": 3, column: chat}] * 2)
    more = {"column": "dialog"} if column == "dialog" else {}
    texts = load_text(source, tokenizer, 5, **more)
    assert texts["text"] == [WRITTEN] * 2
    assert not adds_special_tokens(texts)


def test_chats_of_all_who_speak(tmp_path, tokenizer):
    turns = [("system", "w5"), ("human", "w3"), ("tool", None), ("gpt", "w4")]
    chat = [{"from": who, "value": said} for who, said in turns]
    source = save_rows(tmp_path / "a.jsonl", [{"conversations": chat}])
    assert texts_of(source, tokenizer) == ["system w5 user w3 tool  assistant w4 </s>"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([CHAT, [{"role": "system", "content": "w3"}]], "refuses it: System role not supported"),
        ([CHAT, "w3"], "it holds 'w3', not a list of {role, content} or {from, value} tables"),
        ([CHAT, ["w3", "w4"]], "it is not a list of {role, content} or {from, value}"),
        ([CHAT, [{"speaker": "w3"}]], "it is not a list of {role, content} or {from, value}"),
        ([CHAT, [{"from": "narrator", "value": "w3"}]], "'narrator' is none of human, gpt, system"),
        ([CHAT, [{"role": "user", "content": 3}]], "a turn says 3, which is no text"),
        ([CHAT, [{"role": "user", "content": [{"type": "image"}]}]], "only texts are read"),
    ],
)
def test_chats_with_something_wrong(tmp_path, tokenizer, monkeypatch, cells, message):
    monkeypatch.setattr(tokenizer, "chat_template", NO_SYSTEM)
    source = save_rows(tmp_path / "a.jsonl", [{"messages": cell} for cell in cells])
    with pytest.raises(ValueError, match=r"a\.jsonl', row 2, column 'messages': ") as caught:
        load_text(source, tokenizer, 5)
    assert message in str(caught.value)


def test_lists_that_are_no_chats(tmp_path, tokenizer):
    source = save_rows(tmp_path / "a.jsonl", [{"text": ["w3", "w4"]}])
    with pytest.raises(ValueError, match=r"row 1, column 'text': it is not a list of \{role, "):
        load_text(source, tokenizer, 5)


def test_chats_without_a_template(tmp_path, plain):
    source = save_rows(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(ValueError, match="column 'messages': the tokenizer has no chat template"):
        load_text(source, plain, 5)
