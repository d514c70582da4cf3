"""Runs on encoders from a configuration file to an output folder: what stands in it, and how they go on."""

import json
import os
import struct
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from gaisnet.config.file import load_config
from gaisnet.data.devices import load_device, load_domains, load_public_inputs, majority_share
from gaisnet.data.examples import Labelled
from gaisnet.data.jsonl import read_examples, read_inputs
from gaisnet.errors import ConfigError, DataError, ModelError
from gaisnet.research.bench.baselines import measure_baselines
from gaisnet.runs.run import resume_experiment, run_experiment
from gaisnet.runs.served_run import serve_run
from gaisnet.runs.summary import Summary
from gaisnet.runs.table import closing_captions, closing_rows
from tests.runs.test_resume import files, outcome, read_summary
from tests.test_cli import gaisnet, words
from tests.tiny import SHAPES, TASTES, tiny_encoder, write_tiny_bert_run, write_tiny_vit_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration of two cycles on a BERT, and a finished run in it, of the command."""
    folder = tmp_path_factory.mktemp("bert")
    path = write_tiny_bert_run(folder)
    result = gaisnet("run", path, "--out", folder / "out")
    assert result.exit_code == 0, result.output
    (folder / "printed").write_text(result.output, encoding="utf-8")
    return folder


def summary_of(site: Path) -> Summary:
    return Summary.model_validate(read_summary(site / "out"))


# -- what a run leaves -------------------------------------------------------------------------------------------------


def test_the_command_runs_a_bert_on_lines_of_text_and_label(site: Path) -> None:
    summary = summary_of(site)
    assert len(summary.cycles) == 3 and summary.domains == ("shapes", "tastes")
    first, last = summary.cycles[0], summary.cycles[-1]
    for body in ("domain", "foundation"):
        for domain in summary.domains:
            assert last.bodies()[body][domain].loss < first.bodies()[body][domain].loss
    assert summary.cycles[-1].gate[0].startswith("accepted 'shapes': its shape and numbers were looked at")
    assert summary.majority == {
        name: majority_share(data) for name, data in load_domains(load_config(site / "run.yaml")).items()
    }


def test_there_is_no_merged_adapter_and_no_retention_anywhere(site: Path) -> None:
    summary, printed = summary_of(site), words((site / "printed").read_text(encoding="utf-8"))
    for cycle in summary.cycles:
        assert cycle.merged == {} and cycle.relay == {}
        assert cycle.retention.model_dump() == {"perplexity": None, "drift": None, "adapters": {}}
    assert all(row.merged_after is None and row.foundation_after is not None for row in closing_rows(summary))
    assert closing_captions(summary)[0].startswith("Retention: not measured; the FM writes no text")
    assert "Retention: not measured" in printed
    report = (site / "out" / "report.html").read_text(encoding="utf-8")
    assert "the cloud has no public inputs (model.public_inputs)" in report
    assert "FM with the merged adapter" not in report
    assert {path.name for path in (site / "out" / "adapters").iterdir()} == {"shapes", "tastes"}


def test_saved_adapters_load_in_plain_peft_on_a_model_with_as_many_classes(site: Path) -> None:
    for domain, labels in (("shapes", SHAPES), ("tastes", TASTES)):
        folder = site / "out" / "adapters" / domain
        model = PeftModel.from_pretrained(tiny_encoder("bert", num_classes=len(labels)), str(folder))
        assert model(torch.tensor([[256, 1, 2, 257]])).logits.shape == (1, len(labels))
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["classifier"]
        base = AutoModelForSequenceClassification.from_pretrained(
            config["base_model_name_or_path"], num_labels=len(labels), ignore_mismatched_sizes=True
        )
        found = PeftModel.from_pretrained(base, str(folder))(torch.tensor([[256, 1, 2, 257]])).logits
        torch.testing.assert_close(found, model(torch.tensor([[256, 1, 2, 257]])).logits)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert (
            f"AutoModelForSequenceClassification.from_pretrained({json.dumps(config['base_model_name_or_path'])}, "
            in card
        )


def test_a_run_goes_on_after_a_cycle_to_the_same_end(site: Path) -> None:
    config = load_config(site / "run.yaml")
    run_experiment(config.model_copy(update={"cycles": 1}), site / "short")
    resume_experiment(site / "short", ["cycles=2"])
    assert outcome(read_summary(site / "short")) == outcome(read_summary(site / "out"))
    assert files(site / "short" / "adapters") == files(site / "out" / "adapters")


def test_a_run_that_classifies_answers_nobody(site: Path) -> None:
    found = "its foundation model is an encoder, which tells classes apart and writes no text; serve a run of a decoder"
    with pytest.raises(ConfigError, match=found), serve_run(site / "out"):
        pass
    for command in ("serve", "chat"):
        result = gaisnet(command, site / "out")
        assert result.exit_code == 1 and found in words(result.output)


def test_nothing_is_held_against_a_run_that_classifies(site: Path) -> None:
    with pytest.raises(ModelError, match="its family 'bert' is not supported; use a decoder"):
        measure_baselines(site / "out")


# -- images ------------------------------------------------------------------------------------------------------------


def test_a_vit_learns_pictures_and_its_features_are_watched_on_public_ones(tmp_path: Path) -> None:
    config = load_config(write_tiny_vit_run(tmp_path, domain={"precision": "int8"}))
    summary = run_experiment(config, tmp_path / "out")
    first, last = summary.cycles
    assert last.domain["shapes"].loss < first.domain["shapes"].loss
    assert last.foundation["shapes"].loss < first.foundation["shapes"].loss
    assert last.retention.drift == last.retention.adapters["shapes"] != first.retention.drift
    assert closing_captions(summary)[0].startswith("Retention: adapters move the FM's features of public inputs by ")
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "How far an adapter moves what the FM makes of public inputs" in report
    with safe_open(tmp_path / "out" / "adapters" / "shapes" / "prompts.safetensors", framework="pt") as file:
        assert file.metadata()["method"] == "VPT-deep"
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"drift"' in metrics


def test_pixels_are_what_vits_own_processor_makes_of_a_picture(tmp_path: Path) -> None:
    levels = torch.tensor([[[0, 255, 51]], [[102, 0, 255]]], dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(tmp_path / "colour.png")
    Image.fromarray(levels[..., 0].numpy()).save(tmp_path / "grey.png")
    (tmp_path / "x.jsonl").write_text('{"image": "colour.png"}\n{"image": "grey.png"}', encoding="utf-8")
    colour, grey = read_inputs(tmp_path / "x.jsonl")
    assert isinstance(colour, torch.Tensor) and isinstance(grey, torch.Tensor)
    torch.testing.assert_close(colour, (levels.permute(2, 0, 1) / 255 - 0.5) / 0.5)
    torch.testing.assert_close(grey, (levels[None, ..., 0] / 255 - 0.5) / 0.5)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "a"}', 'lacks \'label\'; write {"text": "...", "label": "..."}'),
        ('{"label": "a"}', "lacks 'completion', 'prompt'; write"),
        ('{"image": "no.png"}', "lacks 'label'; write {\"image\""),
        ('{"image": "no.png", "label": "a"}', "'image' is 'no.png', which is no file; name"),
        ('{"image": "..", "label": "a"}', "'image' is '..', which leads out of the folder of this file; name"),
        ('{"image": ".", "label": "a"}', "'image' is '.', which is no file; name"),
        ('{"image": "\\u0000", "label": "a"}', "'image' is "),
        ('{"image": "%s", "label": "a"}' % ("a" * 5000), "'image' is "),
        ('{"image": "x.jsonl", "label": "a"}', "'image' cannot be read (UnidentifiedImageError: cannot"),
        ('{"text": "a", "label": 4}', "'label' is 4, not text; quote it: \"4\""),
        ('{"text": "a", "image": "b", "label": "c"}', "has unknown keys: 'image'"),
        ('{"text": "a", "completion": "b", "label": "c"}', "has unknown keys: 'completion'"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path: Path, line: str, found: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a", "label": "b"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_examples(tmp_path / "x.jsonl", "device-0")
    assert f"line 2: {found}" in str(raised.value)


def refusal(folder: Path, image: str) -> str:
    """What is said of a line that names a picture; that line must be named."""
    path = folder / "x.jsonl"
    path.write_text(f'\n{{"image": {json.dumps(image)}}}', encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_inputs(path)
    beginning = f"{path}, line 2: 'image' "
    assert str(raised.value).startswith(beginning)
    return str(raised.value).removeprefix(beginning)


def test_pictures_are_read_below_the_folder_only(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    (inner / "below").mkdir(parents=True)
    for path in (tmp_path / "a.png", inner / "below" / "b.png"):
        Image.new("L", (2, 3)).save(path)
    (inner / "link.png").symlink_to(tmp_path / "a.png")
    os.mkfifo(inner / "pipe.png")
    for name in ("../a.png", "below/../below/b.png", str(tmp_path / "a.png"), str(inner / "below/b.png"), "link.png"):
        assert refusal(inner, name).startswith(f"is '{name}', which leads out of the folder")
    for name in ("below", "pipe.png"):
        assert refusal(inner, name).startswith(f"is '{name}', which is no file")
    (inner / "x.jsonl").write_text('{"image": "below/b.png"}', encoding="utf-8")
    (pixels,) = read_inputs(inner / "x.jsonl")
    assert isinstance(pixels, torch.Tensor) and pixels.shape == (1, 3, 2)


def test_a_picture_that_a_program_would_be_run_for_is_not_opened(tmp_path: Path) -> None:
    for name in ("a.eps", "a.png"):
        Image.new("L", (2, 3)).save(tmp_path / name, format="EPS")
        assert refusal(tmp_path, name).startswith("cannot be read (UnidentifiedImageError")


@pytest.mark.parametrize(("mode", "ending"), [("I;16", "png"), ("I;16", "tiff"), ("I", "tiff"), ("F", "tiff")])
def test_greys_of_more_than_8_bits_are_refused_and_not_clipped(tmp_path: Path, mode: str, ending: str) -> None:
    Image.new(mode, (2, 3), 300).save(tmp_path / f"a.{ending}")
    found = f"has pixels of Pillow's mode '{mode}'; save it in grey or RGB with 8 bits a channel, scaled to 0..255"
    assert refusal(tmp_path, f"a.{ending}") == found


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_8_bits_are_read_in_one_channel_or_three(tmp_path: Path, mode: str) -> None:
    kind = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    Image.new("RGB", (2, 3), "white").convert(mode).save(tmp_path / f"a.{kind}")
    (tmp_path / "x.jsonl").write_text(f'{{"image": "a.{kind}"}}', encoding="utf-8")
    (pixels,) = read_inputs(tmp_path / "x.jsonl")
    expected = torch.ones(1 if mode in ("1", "L", "LA") else 3, 3, 2)
    assert isinstance(pixels, torch.Tensor) and torch.equal(pixels, expected)


def png(width: int, height: int) -> bytes:
    """A file that says it has so many pixels, and has none."""
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((4097, 4096), "has 4097 by 4096 pixels, more than 16777216 in all; resize it to the model's size"),
        ((10_000, 10_000), "cannot be read (DecompressionBombWarning: "),
        ((60_000, 60_000), "cannot be read (DecompressionBombError: "),
        ((4096, 4096), "cannot be read (OSError: image file is truncated"),
    ],
)
def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path: Path, size: tuple[int, int], found: str) -> None:
    (tmp_path / "a.png").write_bytes(png(*size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert refusal(tmp_path, "a.png").startswith(found)
    assert not caught


@pytest.mark.parametrize(
    "error",
    [
        *(SyntaxError, NotImplementedError, EOFError, struct.error, IndexError, TypeError, OverflowError, MemoryError),
        *(OSError, ValueError, KeyError, RuntimeError, ZeroDivisionError),
    ],
)
def test_whatever_pillow_raises_of_a_broken_picture_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    Image.new("L", (2, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", Mock(side_effect=error("broken")))
    assert refusal(tmp_path, "a.png").startswith(f"cannot be read ({error.__name__}: ")


def test_a_picture_with_a_broken_chunk_names_its_line(tmp_path: Path) -> None:
    """Pillow finds it when it decodes, and raises a SyntaxError."""
    whole = png(2, 3)
    behind = whole.index(b"IDAT") + 8
    (tmp_path / "a.png").write_bytes(whole[:behind] + b"\0\0\0\1I\0AT" + whole[behind:])
    assert refusal(tmp_path, "a.png").startswith("cannot be read (SyntaxError: broken PNG file")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "there are none in it; write at least one line, or remove model.public_inputs"),
        ('{"text": "a", "label": "b"}', 'line 1: has unknown keys: \'label\'; write {"text": "..."}'),
        ("{}", "line 1: lacks 'text'"),
        (None, "there is no such file; correct model.public_inputs"),
    ],
)
def test_public_inputs_that_cannot_be_read(tmp_path: Path, text: str | None, found: str) -> None:
    if text is not None:
        (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_inputs(tmp_path / "x.jsonl")
    assert found in str(raised.value)


def test_a_device_and_the_cloud_read_what_is_theirs(tmp_path: Path) -> None:
    config = load_config(write_tiny_vit_run(tmp_path))
    (example, *others) = load_device(config, "b").train
    assert isinstance(example, Labelled) and example.label == SHAPES[0] and len(others) == 5
    assert len(load_public_inputs(config)) == 6
    bare = config.model_copy(update={"model": config.model.model_copy(update={"public_inputs": None})})
    assert load_public_inputs(bare) == ()
