"""Conversations about images become batches: every source, and what is wrong with them."""

import json
from io import BytesIO
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from support import tiny_vlms
from support.samples import png
from transformers import AutoModelForImageTextToText, AutoProcessor

from casp_plugin.data.conversation_batches import conversation_loader, processed
from casp_plugin.data.conversations import Conversation, load_conversations

FILLER = "w5 w6 w7"


def rows(count=4):
    return [
        {"image": png(seed=i), "question": f"w{10 + i}", "answer": f"w{20 + i}"}
        for i in range(count)
    ]


def as_jsonl(folder):
    for i, row in enumerate(rows()):
        (folder / f"{i}.png").write_bytes(row["image"])
    lines = [json.dumps({**row, "image": f"{i}.png"}) for i, row in enumerate(rows())]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def as_parquet(folder):
    table = Dataset.from_list([{**row, "image": {"bytes": row["image"]}} for row in rows()])
    table.to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def as_saved(folder):
    images = [Image.open(BytesIO(row["image"])) for row in rows()]
    table = {key: [row[key] for row in rows()] for key in ("question", "answer")}
    Dataset.from_dict({**table, "image": images}).save_to_disk(folder / "data")
    return folder / "data"


def as_dataset(folder):
    return Dataset.from_list([{**row, "image": {"bytes": row["image"]}} for row in rows()])


def as_folder(folder):
    lines = []
    for i, row in enumerate(rows()):
        (folder / f"{i}.png").write_bytes(row.pop("image"))
        lines.append(json.dumps({"file_name": f"{i}.png", **row}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_saved, as_folder, as_dataset])
def test_sources(write, tmp_path):
    source = write(tmp_path)
    found = load_conversations(str(source) if isinstance(source, Path) else source, samples=4)
    assert {one.question for one in found} == {row["question"] for row in rows()}
    for one in found:
        row = next(row for row in rows() if row["question"] == one.question)
        assert one.answer == row["answer"]
        (image,) = one.decoded()
        assert image.tobytes() == Image.open(BytesIO(row["image"])).tobytes()


def test_rows_that_hold_something_else(tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    good = {"image": ["good.png"], "question": "w5", "answer": "w6"}
    odd = {**good, "image": [None]}
    assert len(load_conversations(jsonl(tmp_path, [good] * 30 + [odd]), 31)) == 30
    lists = {**good, "answer": ["w6", "w7"]}
    with pytest.raises(ValueError, match=r"column 'answer' holds .*, not one text a row"):
        load_conversations(jsonl(tmp_path, [lists]), 1)
    (found,) = load_conversations(jsonl(tmp_path, [{**good, "answer": 0}]), 1)
    assert found.answer == "0"


def test_decompression_bombs_are_broken_images(tmp_path, monkeypatch):
    (tmp_path / "good.png").write_bytes(png(8, 8))
    (tmp_path / "bomb.png").write_bytes(png(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    good = {"image": "good.png", "question": "w5", "answer": "w6"}
    source = jsonl(tmp_path, [good] * 20 + [{**good, "image": "bomb.png"}])
    assert len(load_conversations(source, 21)) == 20


def test_seed_and_samples(tmp_path):
    source = str(as_jsonl(tmp_path))
    once, again = (load_conversations(source, samples=2, seed=3) for _ in range(2))
    assert once == again
    assert len(once) == 2


def jsonl(folder, lines):
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "data.jsonl")


def test_missing_column(tmp_path):
    source = jsonl(tmp_path, [{"picture": "a.png", "question": "", "answer": ""}])
    with pytest.raises(ValueError, match=r"no column 'image'; its columns are \['picture'"):
        load_conversations(source, 1)


def test_wrong_objects(tmp_path):
    with pytest.raises(ValueError, match=r"splits \['train'\]: pass one of them"):
        load_conversations(DatasetDict(train=as_dataset(tmp_path)), 2)
    with pytest.raises(ValueError, match="no conversations"):
        conversation_loader([], None, 32)


def test_images_are_turned_as_cameras_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    one = Conversation((tmp_path / "turned.jpg",), "w5", "w6")
    assert one.decoded()[0].size == (20, 40)


def test_broken_images_are_left_out_or_an_error(tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png()[:200])
    good = {"image": "good.png", "question": "w5", "answer": "w6"}
    bad = [{**good, "image": name} for name in ("cut.png", "absent.png")]
    found = load_conversations(jsonl(tmp_path, [good] * 30 + bad), 32)
    assert len(found) == 30
    with pytest.raises(ValueError, match="2 of 4 rows have images that cannot be read"):
        load_conversations(jsonl(tmp_path, [good] * 2 + bad), 32)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    tiny_vlms.save_tiny_vlm(folder, "llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


TOKENS = 16  # of an image


def test_batches_run(llava):
    """One and two images, of several sizes; text alone where there is nothing else."""
    model, processor = llava
    text = Conversation((), "w5 w6", "w7")
    conversations = [
        text,
        Conversation((png(40, 32),), "w5", "w7"),
        Conversation((png(32, 64), png(48, 48)), FILLER, "w7"),
    ]
    batches = []
    for some, count in ((conversations, 2), ([text], 1)):
        loader = conversation_loader(some, processor, max_length=60)
        assert len(loader) == count
        batches += loader
    found = [(batch["input_ids"][0] == model.config.image_token_id).sum() for batch in batches]
    assert found == [TOKENS, 2 * TOKENS, 0]
    for batch in batches:
        assert model(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_chat_template(llava):
    _, processor = llava
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }} {% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endfor %}"
    )
    try:
        (batch,) = conversation_loader([Conversation((png(),), "w5", "w7")], processor, 60)
    finally:
        processor.chat_template = None
    ids = batch["input_ids"][0].tolist()
    role = 3  # a word that is in no vocabulary
    assert ids == [role, *[tiny_vlms.IDS["<image>"]] * TOKENS, 5, role, 7]


def test_one_token_begins_a_sequence(llava):
    """Whether the template writes it or the tokenizer adds it."""
    _, processor = llava
    one = Conversation((), "w5", "w7")
    template = "{{ bos_token }}{% for m in messages %}{{ m.content[0].text }} {% endfor %}"
    processor.tokenizer.add_bos_token = True
    try:
        found = []
        for processor.chat_template in (None, template, template.replace("{{ bos_token }}", "")):
            found += [processed([one], processor)["input_ids"].tolist()]
    finally:
        processor.chat_template = None
        processor.tokenizer.add_bos_token = False
    assert found == [[[1, 5, 7]]] * 3


def test_answers_are_cut_images_are_not(llava):
    _, processor = llava
    fits = Conversation((png(),), FILLER, FILLER)
    too_long = Conversation((png(), png()), FILLER, FILLER)
    (batch,) = conversation_loader([fits, too_long], processor, TOKENS + 2)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, TOKENS + 2)
    with pytest.raises(ValueError, match=r"no conversation fits max_length 20: .* takes 32 tokens"):
        conversation_loader([too_long], processor, 20)


def test_images_that_the_processor_refuses(llava, monkeypatch):
    _, processor = llava
    plain = processor.image_processor.preprocess

    def refusing(images, *args, **kwargs):
        if any(image.size[0] > 200 for one in images for image in one):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return plain(images, *args, **kwargs)

    monkeypatch.setattr(processor.image_processor, "preprocess", refusing)
    good, bad = (Conversation((png(width),), "w5", "w7") for width in (32, 300))
    assert len(conversation_loader([good] * 12 + [bad], processor, 60)) == 12
    with pytest.raises(ValueError, match="1 of 2 rows have images that the processor refuses"):
        conversation_loader([good, bad], processor, 60)


def test_placeholders_in_the_text(llava):
    model, processor = llava
    inside = Conversation((png(),), "w5 <image> w6", "w7")
    (batch,) = conversation_loader([inside], processor, 60)
    images = batch["input_ids"][0] == model.config.image_token_id
    assert images.tolist() == [False] + [True] * TOKENS + [False] * 2
    for images in ((), (png(), png())):
        wrong = Conversation(images, "w5 <image> w6", "w7")
        with pytest.raises(ValueError, match=rf"holds 1 placeholders '<image>' for {len(images)}"):
            conversation_loader([wrong], processor, 60)


@pytest.mark.parametrize("family", ["llava_next", "paligemma", "blip-2", "gemma3"])
def test_processors_of_families(family, tmp_path):
    """An image has as many tokens as the model makes of it, whoever puts them into the text."""
    tiny_vlms.save_tiny_vlm(tmp_path, family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path)
    one = Conversation((png(),), "w5 w6", "w7")
    (batch,) = conversation_loader([one], processor, 60)
    with torch.no_grad():
        model(**batch)
    expected = tiny_vlms.image_prompt(family, expanded=True)
    image = model.config.image_token_id
    assert (batch["input_ids"] == image).sum() == expected.count(image) > 0
    last = int((batch["input_ids"][0] == image).nonzero()[-1])
    (cut,) = conversation_loader([one], processor, last + 1)
    assert cut["input_ids"].shape[1] == last + 1
    with pytest.raises(ValueError, match="no conversation fits"):
        conversation_loader([one], processor, last)


class VideoProcessor:
    """One token a frame; the processors of transformers ask for torchvision."""

    chat_template = None
    video_token = "<|video_pad|>"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, return_tensors, videos=None, do_sample_frames=None):
        assert not videos or do_sample_frames is False
        frames = videos[0] if videos else []
        token = self.video_token
        made = self.tokenizer([text[0].replace(token, token * len(frames))], return_tensors="pt")
        return {**made, "pixel_values_videos": torch.zeros(1, len(frames))} if videos else {**made}


def test_videos(llava, tmp_path):
    """The frames of a row are one video."""
    frames = [png(seed=i) for i in range(3)]
    for i, frame in enumerate(frames):
        (tmp_path / f"{i}.png").write_bytes(frame)
    row = {"frames": ["0.png", "1.png", "2.png"], "question": "w5 w6", "answer": "w7"}
    found = load_conversations(jsonl(tmp_path, [row]), 1, video_column="frames")
    processor = VideoProcessor(llava[1].tokenizer)
    (batch,) = conversation_loader(found, processor, max_length=60)
    video = tiny_vlms.IDS["<|video_pad|>"]
    assert batch["input_ids"].tolist() == [[video, video, video, 5, 6, 7]]
    assert batch["pixel_values_videos"].shape == (1, 3)
    twice = Conversation(tuple(frames), "w5 <|video_pad|> <|video_pad|>", "w7", video=True)
    with pytest.raises(ValueError, match=r"2 placeholders '<\|video_pad\|>' for 1 videos"):
        conversation_loader([twice], processor, 60)
    with pytest.raises(ValueError, match="the shortest takes 3 tokens"):
        conversation_loader(found, processor, 2)


@pytest.mark.parametrize("family", ["llava_next_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_videos_through_processors_of_families(family, tmp_path):
    pytest.importorskip("torchvision")
    tiny_vlms.save_tiny_vlm(tmp_path, family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path)
    one = Conversation((png(seed=0), png(seed=1)), "w5 w6", "w7", video=True)
    (batch,) = conversation_loader([one], processor, 60)
    assert "pixel_values_videos" in batch
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()
