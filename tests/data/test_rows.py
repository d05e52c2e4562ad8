"""Samples of every kind that users have them in: strings, mappings, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

import miner_lens as ml
from miner_lens.data.media import load_media

hf_datasets = pytest.importorskip("datasets")

MESSAGES = [{"role": "user", "content": "is it red?"}]


def test_a_string_is_one_answer() -> None:
    assert ml.Sample(MESSAGES, "circle").answers == ("circle",)
    assert ml.Sample(MESSAGES, ["circle", "disc"]).answers == ("circle", "disc")
    assert ml.Sample(MESSAGES).answers == ()


@pytest.mark.parametrize("answers", [None, 4, b"yes", ["yes", 4], [["yes"]], {"text": "yes"}])
def test_answers_that_are_no_strings(answers: Any) -> None:
    with pytest.raises(TypeError, match="a string or a list of strings"):
        ml.Sample(MESSAGES, answers)


def test_samples_of_mappings() -> None:
    sample = ml.Sample(MESSAGES, "yes", "q1", "colours")
    row = {"messages": MESSAGES, "answers": "yes", "id": "q1", "label": "colours", "split": "test"}
    assert ml.Sample.of(sample) is sample
    assert ml.Sample.of(row) == sample
    assert ml.Sample.of({"messages": MESSAGES, "answers": None, "id": 3}) == ml.Sample(
        MESSAGES, (), "3"
    )


def test_what_is_no_sample() -> None:
    with pytest.raises(ValueError, match=r"has 'question', 'answer'.*from_rows"):
        ml.Sample.of({"question": "is it red?", "answer": "yes"})
    with pytest.raises(TypeError, match="a mapping with messages and answers, not tuple"):
        ml.Sample.of((MESSAGES, "yes"))


def test_rows_by_their_columns() -> None:
    table = [{"talk": MESSAGES, "truth": "yes", "number": n, "kind": 7} for n in range(3)]
    data = ml.datasets.from_rows(table, "talk", answers="truth", id="number", label="kind")
    assert len(data) == 3
    assert data[-1] == ml.Sample(MESSAGES, "yes", "2", "7")
    assert [sample.id for sample in data] == ["0", "1", "2"]
    assert [sample.id for sample in data[1:]] == ["1", "2"]
    assert ml.datasets.from_rows(table, "talk")[0] == ml.Sample(MESSAGES)
    with pytest.raises(IndexError):
        data[3]


def test_rows_by_functions() -> None:
    table = [{"question": "is it red?", "truth": "Yes"}]
    data = ml.datasets.from_rows(
        table,
        messages=lambda row: [{"role": "user", "content": row["question"]}],
        answers=lambda row: row["truth"].lower(),
    )
    assert data[0] == ml.Sample(MESSAGES, "yes")


def test_a_table_of_pandas() -> None:
    table = pd.DataFrame({"truth": ["yes", "no"], "number": [4, 5]}, index=[7, 0])
    data = ml.datasets.from_rows(table, lambda row: MESSAGES, answers="truth", id="number")
    assert len(data) == 2
    assert list(data) == [ml.Sample(MESSAGES, "yes", "4"), ml.Sample(MESSAGES, "no", "5")]


def test_columns_that_are_not_there() -> None:
    table = [{"talk": MESSAGES, "truth": "yes"}]
    with pytest.raises(ValueError, match=r"no column 'lable' for the answers.*'talk', 'truth'"):
        ml.datasets.from_rows(table, "talk", answers="lable")[0]
    with pytest.raises(TypeError, match=r"not str.*a list of dicts"):
        next(iter(ml.datasets.from_rows({"talk": MESSAGES}, "talk")))


def test_a_stream_is_read_as_far_as_needed() -> None:
    read = []

    def stream() -> Any:
        for number in range(10):
            read.append(number)
            yield {"messages": MESSAGES, "number": number}

    rows = hf_datasets.IterableDataset.from_generator(stream)
    samples = iter(ml.datasets.from_rows(rows, id="number"))
    assert next(samples) == ml.Sample(MESSAGES, (), "0")
    assert read == [0]


class Counting:
    """Counts which rows are read."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.read = rows, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.rows[index]


def test_tables_are_read_by_number_when_needed() -> None:
    table = Counting([{"messages": MESSAGES, "number": n} for n in range(10)])
    data = ml.datasets.from_rows(table, id="number")
    assert len(data) == 10
    assert len(data[3:7]) == 4
    assert table.read == []
    assert data[3:7][1].id == "4"
    assert table.read == [4]


@pytest.fixture(scope="module")
def pictures() -> Any:
    """Four easy-VQA questions as a data set with pictures inside the messages, and one without."""
    rows = []
    for sample in ml.datasets.load("easy-vqa", limit=4):
        picture, question = sample.messages[0]["content"]
        content = [
            {"type": "image", "text": None, "image": picture["image"]},
            {"type": "text", "text": question["text"], "image": None},
        ]
        rows.append({"messages": [{"role": "user", "content": content}], "answers": sample.answers})
    plain = [{"type": "text", "text": "the picture shows a red circle. is it red?", "image": None}]
    rows.append({"messages": [{"role": "user", "content": plain}], "answers": ("yes",)})
    text = hf_datasets.Value("string")
    part = {"type": text, "text": text, "image": hf_datasets.Image()}
    features = hf_datasets.Features(
        {"messages": [{"role": text, "content": [part]}], "answers": hf_datasets.List(text)}
    )
    return hf_datasets.Dataset.from_list(rows, features=features)


def as_samples(table: Any) -> list[ml.Sample]:
    """Samples with the same content, made by hand."""
    samples = []
    for row in table:
        parts = [
            {key: value for key, value in part.items() if value is not None}
            for part in row["messages"][0]["content"]
        ]
        samples.append(ml.Sample([{"role": "user", "content": parts}], row["answers"]))
    return samples


def test_a_hugging_face_data_set_is_mined_and_answered(
    shapes: Any, pictures: Any, tmp_path: Path
) -> None:
    """Rows give what samples give, also with pictures from a parquet file."""
    pictures.to_parquet(tmp_path / "pictures.parquet")
    again = hf_datasets.Dataset.from_parquet(
        str(tmp_path / "pictures.parquet"), cache_dir=str(tmp_path)
    )
    content = again[0]["messages"][0]["content"]
    assert isinstance(content[0]["image"], Image.Image)
    assert content[1]["image"] is None
    samples = as_samples(pictures)
    expected, answers = ml.mine(shapes, samples, progress=False), ml.answers(shapes, samples)
    assert expected.occurrences[expected.modalities.index("image")] == 4
    for data in (pictures, again, ml.datasets.from_rows(again, answers="answers")):
        assert torch.equal(ml.mine(shapes, data, progress=False).values, expected.values)
        assert ml.answers(shapes, data) == answers
    assert ml.accuracy(shapes, pictures) == ml.accuracy(shapes, samples) > 0.5


def test_an_image_column(shapes: Any) -> None:
    samples = ml.datasets.load("easy-vqa", limit=3)
    columns = {
        "picture": [sample.messages[0]["content"][0]["image"] for sample in samples],
        "question": [sample.messages[0]["content"][1]["text"] for sample in samples],
        "truth": [sample.answers[0] for sample in samples],
    }
    table = hf_datasets.Dataset.from_dict(columns).cast_column("picture", hf_datasets.Image())

    def messages(row: Any) -> Any:
        picture = {"type": "image", "image": row["picture"]}
        content = [picture, {"type": "text", "text": row["question"]}]
        return [{"role": "user", "content": content}]

    def mined(table: Any) -> torch.Tensor:
        data = ml.datasets.from_rows(table, messages, answers="truth")
        assert ml.accuracy(shapes, data) == ml.accuracy(shapes, samples)
        return ml.mine(shapes, data, progress=False).values

    expected = ml.mine(shapes, samples, progress=False).values
    assert isinstance(table[0]["picture"], Image.Image)
    assert torch.equal(mined(table), expected)
    undecoded = table.cast_column("picture", hf_datasets.Image(decode=False))
    assert set(undecoded[0]["picture"]) == {"bytes", "path"}
    assert torch.equal(mined(undecoded), expected)
    assert torch.equal(mined(table.to_iterable_dataset()), expected)


def test_keys_without_a_value_are_no_media() -> None:
    message = {
        "role": "user",
        "content": [{"type": "text", "text": "a", "image": None}],
        "name": None,
    }
    assert load_media([message]) == [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
    ]
    with pytest.raises(ml.SampleError, match="needs a role and a content"):
        load_media([{"role": "user", "content": None}])
    with pytest.raises(ml.SampleError, match="needs a type"):
        load_media([{"role": "user", "content": [{"type": None, "text": "a"}]}])
    with pytest.raises(ml.SampleError, match="a string or a list of parts, not 3"):
        load_media([{"role": "user", "content": 3}])


def test_images_are_turned_upright_wherever_they_come_from(tmp_path: Path) -> None:
    """A photograph of a camera held sideways: green is above red, and the file says so by EXIF."""
    upright = Image.new("RGB", (8, 16), "red")
    upright.paste("lime", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[274] = 6  # turn it by 90 degrees to the right
    path = tmp_path / "photograph.png"
    upright.rotate(90, expand=True).save(path, exif=exif)
    for source in (path, path.read_bytes(), Image.open(path)):
        content = [{"type": "image", "image": source}]
        (message,) = load_media([{"role": "user", "content": content}])
        assert message["content"][0]["image"].tobytes() == upright.tobytes()
