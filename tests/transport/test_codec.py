"""The codec: every message comes back, within the stated error; whatever else comes in is refused, and in one way."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from torch import Tensor

from gaisnet.config import TensorCode, WireSettings
from gaisnet.errors import WireFormatError
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    AnchorRequest,
    BodyOutput,
    BodyOutputGrad,
    BodyRequest,
    Chunk,
    ChunkRequest,
    CloseSession,
    CropSession,
    Done,
    EscalateSession,
    Evaluate,
    EvaluateGuest,
    EvaluationReport,
    ExtendSession,
    FineTune,
    Install,
    Installed,
    LabelRequest,
    Lengths,
    LengthsOfDevices,
    LengthsRequest,
    Message,
    ModelRelease,
    ModelRequest,
    OpenSession,
    Parcel,
    ParcelSent,
    ParcelTaken,
    SessionOpened,
    SessionRows,
    Shared,
    ShareRequest,
    SmashedData,
    SmashRequest,
    TrafficReport,
    TrafficRequest,
    Wanted,
)
from gaisnet.transport.codec import Codec

EXACT = WireSettings(
    smashed="float32", session="float32", anchor="float32", body_output="float32", gradient="float32", adapter="float32"
)
Header = dict[str, Any]
Change = Callable[[Header], object]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def adapter() -> dict[str, Tensor]:
    return {"layers.4.mlp.lora_A.weight": numbers(2, 5), "layers.4.mlp.lora_B.weight": numbers(5, 2)}


def int8_weights() -> dict[str, Tensor]:
    codes = torch.randint(-127, 128, (4, 3), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    return {"layers.2.weight": codes, "norm.weight": numbers(3).bfloat16(), "embed_tokens.weight": numbers(6, 3).half()}


SAMPLES: dict[type[Message], list[Message]] = {
    Done: [Done()],
    LengthsRequest: [LengthsRequest()],
    Lengths: [Lengths(7, 2, 130), Lengths(3, 0, 0)],
    LengthsOfDevices: [LengthsOfDevices(("a", "b"), ((7, 2, 130), (3, 0, 0))), LengthsOfDevices((), ())],
    ModelRelease: [ModelRelease('{"a": "é"}', (0, 2), (2,), int8_weights()), ModelRelease("{}", (), (), {})],
    AdapterRelease: [AdapterRelease("relay", 3, adapter()), AdapterRelease("domain", 0, {})],
    AdapterUpdate: [
        AdapterUpdate(3, 2, 14, 6, 0.25, ("cycle 2: without a",), adapter()),
        AdapterUpdate(1, 0, 1, 1, 0.5, (), {}),
    ],
    AnchorRelease: [AnchorRelease(int32(3, 1), numbers(4, 4)), AnchorRelease(int32(), numbers(0, 4))],
    SmashRequest: [SmashRequest("train"), SmashRequest("test")],
    SmashedData: [
        SmashedData("clinic-a", "train", 1, int32(3, 2), int32(2, 1), numbers(5, 4)),
        SmashedData("clinic-b", "test", 0, int32(), int32(), numbers(0, 4)),
    ],
    BodyOutput: [BodyOutput("train", 7, 3, int32(4, 0), numbers(3, 4))],
    BodyOutputGrad: [BodyOutputGrad(7, 1.5e-3, numbers(3, 4)), BodyOutputGrad(2**40, 0.0, numbers(0, 4))],
    EvaluationReport: [EvaluationReport(5, 2, 15, 7.75)],
    FineTune: [FineTune(1), FineTune(1, 2)],
    Evaluate: [Evaluate("domain", None), Evaluate("foundation", "medical", "validate")],
    EvaluateGuest: [EvaluateGuest(adapter(), adapter()), EvaluateGuest({}, adapter())],
    Install: [Install("run", "digest")],
    Installed: [Installed(0, -1)],
    ModelRequest: [ModelRequest()],
    AnchorRequest: [AnchorRequest()],
    TrafficRequest: [TrafficRequest()],
    TrafficReport: [TrafficReport(1, 2, 3, 2**40)],
    Parcel: [Parcel("ModelRelease", "0f" * 32, 2**33, 2**26 - 2**10)],
    Wanted: [Wanted(0), Wanted(7)],
    ChunkRequest: [ChunkRequest("0f" * 32, 3)],
    Chunk: [Chunk("0f" * 32, 3, "f0" * 32, torch.tensor([1, 0, 255], dtype=torch.uint8))],
    ParcelSent: [ParcelSent("0f" * 32)],
    ParcelTaken: [ParcelTaken("0f" * 32)],
    BodyRequest: [BodyRequest("clinic-a", None), BodyRequest("clinic-a", "merged", "validate")],
    ShareRequest: [ShareRequest()],
    Shared: [Shared(()), Shared(("clinic-a", "clinic-b"))],
    LabelRequest: [LabelRequest("clinic-a", 7, 3, int32(4, 0), numbers(3, 4))],
    OpenSession: [OpenSession(1, 30, ("relay", "domain"), 96), OpenSession(0, 1, (), 0, "foundation", True)],
    SessionOpened: [SessionOpened("0f"), SessionOpened("0f", ("relay@0", "domain@1"))],
    EscalateSession: [EscalateSession("0f", ("medical",), 1), EscalateSession("0f", (), 0)],
    ExtendSession: [ExtendSession("0f", 7, 1, numbers(3, 4)), ExtendSession("0f", 0, 0, numbers(1, 4))],
    SessionRows: [SessionRows(numbers(2, 4)), SessionRows(numbers(0, 4))],
    CropSession: [CropSession("0f", 5)],
    CloseSession: [CloseSession("0f")],
}

SMASHED = SAMPLES[SmashedData][0]


def same(found: object, expected: object) -> bool:
    """Equal in type and value; of tensors also dtype, shape and every number."""
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(same(found[k], expected[k]) for k in found)
        )
    return type(found) is type(expected) and found == expected


def framed(header: Header | bytes, numbers_after: bytes = b"") -> bytes:
    """A frame with a header that the codec would not write."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers_after


def taken_apart(frame: bytes) -> tuple[Header, bytes]:
    stop = 8 + int.from_bytes(frame[:8], "little")
    return json.loads(frame[8:stop]), frame[stop:]


def changed(message: Message, change: Change, settings: WireSettings = EXACT) -> bytes:
    """The frame of ``message`` after ``change`` has been at its header; the plain fields stand under "fields"."""
    header, after = taken_apart(Codec(settings).encode(message))
    metadata = header["__metadata__"]
    metadata["fields"] = json.loads(metadata["fields"])
    change(header)
    metadata["fields"] = json.dumps(metadata["fields"])
    return framed(header, after)


def plain(**values: object) -> Change:
    return lambda header: header["__metadata__"]["fields"].update(values)


def without(name: str) -> Change:
    return lambda header: header["__metadata__"]["fields"].pop(name)


def about(tensor: str, **values: object) -> Change:
    return lambda header: header[tensor].update(values)


def refused(frame: bytes, match: str | None = None) -> None:
    with pytest.raises(WireFormatError, match=match):
        Codec(EXACT).decode(frame)


# -- what is sent comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", Message.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_message_comes_back(kind: type[Message]) -> None:
    for message in SAMPLES[kind]:
        found = Codec(EXACT).decode(Codec(EXACT).encode(message))
        assert type(found) is kind
        for declared in fields(kind):
            expected = getattr(message, declared.name)
            assert same(getattr(found, declared.name), expected), f"{declared.name}: {expected}"


@pytest.mark.parametrize("kind", Message.__subclasses__(), ids=lambda kind: kind.__name__)
def test_the_reader_needs_no_settings_of_the_writer(kind: type[Message]) -> None:
    written = Codec(WireSettings(smashed="int8", body_output="float16", gradient="bfloat16", adapter="int8"))
    for message in SAMPLES[kind]:
        found = Codec(EXACT).decode(written.encode(message))
        for declared in fields(kind):
            value = getattr(found, declared.name)
            if isinstance(value, Tensor) and "wire" in declared.metadata:
                assert value.dtype == torch.float32
                torch.testing.assert_close(value, getattr(message, declared.name), atol=0.02, rtol=0.01)


def test_weights_of_a_release_keep_dtype_and_bits_whatever_the_settings() -> None:
    coarse = Codec(WireSettings(smashed="int8", body_output="int8", gradient="int8", adapter="int8"))
    (sent, _) = SAMPLES[ModelRelease]
    found = coarse.decode(coarse.encode(sent))
    assert isinstance(found, ModelRelease) and isinstance(sent, ModelRelease)
    assert same(found.tensors, sent.tensors)


def test_a_view_is_sent_as_its_own_numbers_only() -> None:
    rows_ND = numbers(100, 4)
    for view_ND in (rows_ND[10:13], rows_ND.t()[:, 10:13].t()):
        frame = Codec(EXACT).encode(BodyOutput("train", 0, 3, int32(0, 1, 2), view_ND))
        found = Codec(EXACT).decode(frame)
        assert isinstance(found, BodyOutput) and torch.equal(found.rows_ND, rows_ND[10:13])
        assert len(frame) < 600


def test_a_tensor_that_needs_a_gradient_is_sent_as_numbers() -> None:
    found = Codec(EXACT).decode(Codec(EXACT).encode(BodyOutputGrad(0, 0.0, numbers(1, 2).requires_grad_())))
    assert isinstance(found, BodyOutputGrad) and not found.grad_ND.requires_grad


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_arrives_so_that_the_edge_can_name_the_step(loss: float) -> None:
    found = Codec(EXACT).decode(Codec(EXACT).encode(BodyOutputGrad(3, loss, numbers(1, 2))))
    assert isinstance(found, BodyOutputGrad) and str(found.loss_sum) == str(loss)


# -- error bounds, as the docstring of codec.py states them ------------------------------------------------------------


def of_group(rows: Tensor) -> Tensor:
    """The largest magnitude among the 32 that share a scale with each number."""
    groups = [group.abs().amax(dim=-1, keepdim=True).expand_as(group) for group in rows.split(32, dim=-1)]
    return torch.cat(groups, dim=-1)


BOUNDS: dict[TensorCode, Callable[[Tensor], Tensor]] = {
    "float32": torch.zeros_like,
    "float16": lambda rows: rows.abs() * 2**-11 + 2**-25,
    "bfloat16": lambda rows: rows.abs() * 2**-8,
    "int8": lambda rows: (rows.abs().amax(dim=-1, keepdim=True) / 254).expand_as(rows),
    "int4": lambda rows: (of_group(rows) + rows.abs().amax(dim=-1, keepdim=True) / 255) / 14,
}
LARGEST: dict[TensorCode, float] = {"float32": 3e38, "float16": 65504.0, "bfloat16": 3e38, "int8": 3e38, "int4": 3e38}


def through_codec(rows: Tensor, code: TensorCode, rounding: Literal["nearest", "stochastic"] = "nearest") -> Tensor:
    codec = Codec(WireSettings(gradient=code, gradient_rounding=rounding))
    found = codec.decode(codec.encode(BodyOutputGrad(0, 0.0, rows)))
    assert isinstance(found, BodyOutputGrad)
    return found.grad_ND


def rows_of_all_sizes(largest: float, seed: int) -> Tensor:
    """Rows from zero over tiny to huge, in each of them numbers of very different size."""
    generator = torch.Generator().manual_seed(seed)
    rows_ND = torch.randn(64, 33, generator=generator)
    rows_ND *= 10 ** (torch.rand(64, 1, generator=generator) * 50 - 25)
    rows_ND[::3] *= 10 ** (torch.rand(22, 33, generator=generator) * 8 - 8)
    rows_ND[rows_ND.abs() < 1e-35] = 0.0  # below the normal numbers of float32 no relative bound can hold
    rows_ND[5] = 0.0
    rows_ND[6] = largest
    rows_ND[7, ::2] = 0.0
    return rows_ND.clamp(-largest, largest)


@pytest.mark.parametrize("code", BOUNDS)
@pytest.mark.parametrize("seed", range(5))
def test_error_is_within_the_bound(code: TensorCode, seed: int) -> None:
    rows_ND = rows_of_all_sizes(LARGEST[code], seed)
    error_ND = (through_codec(rows_ND, code).double() - rows_ND.double()).abs()
    slack = 1 + 1e-5  # of float32 in the scale
    assert bool((error_ND <= BOUNDS[code](rows_ND.double()) * slack).all())


@pytest.mark.parametrize("code", ["int8", "int4"])
@pytest.mark.parametrize("seed", range(5))
def test_rounded_by_chance_an_error_is_twice_as_large_at_most(code: TensorCode, seed: int) -> None:
    rows_ND = rows_of_all_sizes(LARGEST[code], seed)
    error_ND = (through_codec(rows_ND, code, "stochastic").double() - rows_ND.double()).abs()
    assert bool((error_ND <= 2 * BOUNDS[code](rows_ND.double()) * (1 + 1e-5)).all())
    assert bool((error_ND > BOUNDS[code](rows_ND.double())).any())


@pytest.mark.parametrize("code", ["int8", "int4"])
def test_rounded_by_chance_an_error_is_zero_in_the_mean(code: TensorCode) -> None:
    row_D = numbers(1, 64)[0]
    rows_ND = row_D.expand(4000, -1).clone()
    limit_D = 5 * 2 * BOUNDS[code](row_D[None])[0] / 4000**0.5  # of a mean of so many, whose spread is less than that
    mean_D = (through_codec(rows_ND, code, "stochastic") - rows_ND).mean(dim=0).abs()
    assert bool((mean_D < limit_D).all())
    assert not bool(((through_codec(rows_ND, code) - rows_ND).mean(dim=0).abs() < limit_D).all())


@pytest.mark.parametrize("code", ["int8", "int4"])
def test_chance_is_the_same_for_the_same_numbers_everywhere(code: TensorCode) -> None:
    rows_ND = numbers(8, 33)
    torch.manual_seed(1)
    first_ND = through_codec(rows_ND, code, "stochastic")
    torch.manual_seed(2)
    assert torch.equal(through_codec(rows_ND, code, "stochastic"), first_ND)
    rows_ND[0, 0] += 0.25
    assert not torch.equal(through_codec(rows_ND, code, "stochastic")[1:], first_ND[1:])


@pytest.mark.parametrize("code", ["float16", "bfloat16", "int8", "int4"])
def test_a_bound_is_not_far_from_the_error(code: TensorCode) -> None:
    rows_ND = numbers(64, 33)
    share = (through_codec(rows_ND, code) - rows_ND).abs() / BOUNDS[code](rows_ND)
    assert 0.4 < share.max().item() <= 1.001


@pytest.mark.parametrize("width", [3, 31, 32])
def test_logits_of_few_classes_are_never_in_four_bits(width: int) -> None:
    codec, rows_ND = Codec(WireSettings()), numbers(4, width)
    for message, tensor in (
        (BodyOutput("train", 0, 4, int32(0, 1, 2, 3), rows_ND), "rows_ND"),
        (BodyOutputGrad(0, 1.0, rows_ND), "grad_ND"),
    ):
        found = getattr(codec.decode(codec.encode(message)), tensor)
        assert torch.equal(found, rows_ND) == (width < 32)
    in_int8 = Codec(WireSettings(body_output="int8"))
    sent = in_int8.decode(in_int8.encode(BodyOutput("train", 0, 4, int32(0, 1, 2, 3), rows_ND)))
    assert not torch.equal(sent.rows_ND, rows_ND)  # type: ignore[attr-defined]


def test_adapters_in_four_bits_are_so_however_short_their_rows_are() -> None:
    codec = Codec(WireSettings(adapter="int4"))
    sent = codec.decode(codec.encode(AdapterRelease("domain", 1, adapter())))
    assert not any(torch.equal(sent.tensors[key], t) for key, t in adapter().items())  # type: ignore[attr-defined]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("code", BOUNDS)
def test_zeros_stay_zeros(code: TensorCode, rounding: Literal["nearest", "stochastic"]) -> None:
    assert torch.equal(through_codec(torch.zeros(3, 4), code, rounding), torch.zeros(3, 4))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("code", BOUNDS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 1), (4,), (2, 3, 4)])
def test_shapes_come_back(code: TensorCode, shape: tuple[int, ...], rounding: Literal["nearest", "stochastic"]) -> None:
    assert through_codec(numbers(*shape), code, rounding).shape == shape


def test_a_huge_row_takes_nothing_from_another_in_int8() -> None:
    rows_ND = numbers(2, 8)
    rows_ND[0] *= 1e30
    alone_ND = through_codec(rows_ND[1:], "int8")
    assert torch.equal(through_codec(rows_ND, "int8")[1:], alone_ND)


@pytest.mark.parametrize("code", BOUNDS)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_turn_into_a_number(code: TensorCode, odd: float) -> None:
    rows_ND = numbers(2, 4)
    rows_ND[1, 2] = odd
    found_ND = through_codec(rows_ND, code)
    assert not torch.isfinite(found_ND[1]).all() and torch.isfinite(found_ND[0]).all()


def test_float16_does_not_hide_a_number_that_it_cannot_hold() -> None:
    assert not torch.isfinite(through_codec(torch.tensor([[1e5, 1.0]]), "float16")[0, 0])


@pytest.mark.parametrize(
    ("code", "size"), [("float32", 4.0), ("float16", 2.0), ("bfloat16", 2.0), ("int8", 1.0), ("int4", 0.53)]
)
def test_a_code_costs_what_it_says(code: TensorCode, size: float) -> None:
    one, many = (
        len(Codec(WireSettings(gradient=code)).encode(BodyOutputGrad(0, 0.0, numbers(n, 1000)))) for n in (1, 101)
    )
    assert size <= (many - one) / 100_000 < size + 0.01


# -- hostile frames ----------------------------------------------------------------------------------------------------


def test_nothing_is_no_message() -> None:
    for size in range(9):
        refused(bytes(size))


def test_a_frame_that_stops_early_is_refused_wherever_it_stops() -> None:
    frame = Codec(WireSettings()).encode(SMASHED)
    for size in range(len(frame)):
        refused(frame[:size])


def test_a_frame_that_goes_on_is_refused() -> None:
    refused(Codec(EXACT).encode(SMASHED) + b"\0", "no tensors")


@pytest.mark.parametrize("size", [100, 2**24 + 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_frame_is_refused_before_it_is_read(size: int) -> None:
    refused(size.to_bytes(8, "little") + b"{}", f"a header of {size} bytes in a frame of 10")


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"no json", b"[1]", b"null", b"3", b'"text"', b"{}", b'{"__metadata__": 3}', b'{"__metadata__": {}}'),
        *(b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000),
        *(
            b'{"__metadata__": {"version": "1", "message": "Done"}}',
            b'{"__metadata__": {"version": "1", "message": "Done", "fields": 3}}',
        ),
        *(
            b'{"__metadata__": {"version": "1", "message": "Done", "fields": "[]"}}',
            b'{"__metadata__": {"version": "1", "message": "Done", "fields": "{"}}',
        ),
        b'{"__metadata__": {"version": "1", "message": "Done", "fields": "{}", "more": 3}}',
        b'{"__metadata__": {"version": "1", "message": "Done", "fields": "{}"}, "__metadata__": {}}',
        b'{"__metadata__": {"version": "1", "message": "Done", "fields": "{}"}, '
        b'"__metadata__": {"version": "1", "message": "Done", "fields": "{}"}}',
    ],
    ids=lambda header: header[:40].decode("latin1"),
)
def test_a_header_that_is_none_is_refused(header: bytes) -> None:
    refused(framed(header, bytes(8)))


@pytest.mark.parametrize("name", ["Donne", "", "Message", "object", "\ud800", None, 3, [], {}, ["Done"]])
def test_an_unknown_message_is_refused(name: object) -> None:
    refused(framed({"__metadata__": {"version": "1", "message": name, "fields": "{}"}}))


def test_an_unknown_message_is_named() -> None:
    refused(
        framed({"__metadata__": {"version": "1", "message": "Attack", "fields": "{}"}}), "an unknown message 'Attack'"
    )


@pytest.mark.parametrize(
    "change",
    [
        *(without("split"), without("owner"), without("next_layer"), plain(surprise=1), plain(__pydantic_config__={})),
        *(plain(split="validation"), plain(split=1), plain(owner=3), plain(owner=None), plain(owner=["clinic-a"])),
        *(plain(next_layer=v) for v in ("1", "one", 1.5, True, None, [1], {"a": 1}, float("nan"), float("inf"), 1e300)),
    ],
)
def test_fields_that_are_missing_unknown_or_of_a_wrong_type_are_refused(change: Change) -> None:
    Codec(EXACT).decode(changed(SMASHED, lambda header: None))  # the frame is fine before the change
    refused(changed(SMASHED, change), "a SmashedData with wrong fields")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (SAMPLES[BodyOutputGrad][0], plain(loss_sum="1.0")),
        (SAMPLES[BodyOutputGrad][0], plain(loss_sum=None)),
        (SAMPLES[BodyOutputGrad][0], plain(loss_sum=True)),
        (SAMPLES[EvaluationReport][0], plain(num_correct="2")),
        (SAMPLES[EvaluationReport][0], plain(num_correct=False)),
        (SAMPLES[Evaluate][1], plain(body="cloud")),
        (SAMPLES[Evaluate][1], plain(adapter=7)),
        (SAMPLES[AdapterUpdate][0], plain(version=1.25)),
        (SAMPLES[AdapterRelease][0], plain(role="admin")),
        (SAMPLES[ModelRelease][0], plain(layers="02")),
        (SAMPLES[ModelRelease][0], plain(layers=["0", "2"])),
        (SAMPLES[ModelRelease][0], plain(layers=[0.5])),
        (SAMPLES[ModelRelease][0], plain(layers={"0": 2})),
        (SAMPLES[ModelRelease][0], plain(config_json={"a": 1})),
        (SAMPLES[Done][0], plain(surprise=1)),
    ],
)
def test_scalars_are_typed_strictly(message: Message, change: Change) -> None:
    refused(changed(message, change), f"a {type(message).__name__} with wrong fields")


@pytest.mark.parametrize("numbers_in_json", [[1.0], "AAAA", None, {}])
def test_a_tensor_cannot_come_as_a_plain_field(numbers_in_json: object) -> None:
    refused(
        framed(
            {
                "__metadata__": {
                    "version": "1",
                    "message": "BodyOutputGrad",
                    "fields": json.dumps({"step": 0, "loss_sum": 0.0, "grad_ND": numbers_in_json}),
                }
            }
        ),
        "a BodyOutputGrad with wrong fields",
    )


def test_a_missing_tensor_is_refused() -> None:
    refused(
        framed(
            {"__metadata__": {"version": "1", "message": "BodyOutputGrad", "fields": '{"step": 0, "loss_sum": 0.0}'}}
        ),
        "grad_ND",
    )


def test_a_whole_number_may_stand_for_a_float() -> None:
    found = Codec(EXACT).decode(changed(SAMPLES[BodyOutputGrad][0], plain(loss_sum=2)))
    assert isinstance(found, BodyOutputGrad) and found.loss_sum == 2.0


@pytest.mark.parametrize(
    "name", ["more", "tensors/a", "hidden_ND/a", "owner", "lengths_E/", "#scale", "hidden_ND#scale"]
)
def test_tensors_that_no_field_declares_are_refused(name: str) -> None:
    def add(header: Header) -> None:
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

    refused(changed(SMASHED, add))


@pytest.mark.parametrize(
    ("lengths", "labels", "shape"),
    [
        (int32(3, 2), int32(2, 1), (4, 4)),
        (int32(3, 2), int32(2, 1), (6, 4)),
        (int32(3, 2), int32(2, 1), (5,)),
        (int32(3, 2), int32(2, 1), (5, 2, 2)),
        (int32(3, 2), int32(2), (5, 4)),
        (int32(3, 2), int32(0, 1), (5, 4)),
        (int32(3, 2), int32(2, 3), (5, 4)),
        (int32(6, -1), int32(2, -1), (5, 4)),
        (int32(3, 2).reshape(2, 1), int32(2, 1).reshape(2, 1), (5, 4)),
        (torch.tensor([3, 2]), torch.tensor([2, 1]), (5, 4)),
        (torch.tensor([3.0, 2.0]), int32(2, 1), (5, 4)),
    ],
)
def test_smashed_data_whose_counts_do_not_fit_is_refused(
    lengths: Tensor, labels: Tensor, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="smashed data|must be int32"):
        SmashedData("clinic-a", "train", 1, lengths, labels, numbers(*shape))
    forged = object.__new__(SmashedData)  # what a sender that checks nothing would write
    values = {"owner": "clinic-a", "split": "train", "next_layer": 1, "lengths_E": lengths, "num_labels_E": labels}
    for name, value in {**values, "hidden_ND": numbers(*shape)}.items():
        object.__setattr__(forged, name, value)
    refused(Codec(EXACT).encode(forged), "a SmashedData with wrong fields")


FOUR_BYTES = BodyOutputGrad(0, 0.0, torch.zeros(1, 1))


@pytest.mark.parametrize("dtype", ["I32", "U32", "F31", "f32", "", 3, None])
def test_rows_that_are_not_floating_are_refused(dtype: object) -> None:
    Codec(EXACT).decode(changed(FOUR_BYTES, lambda header: None))
    refused(changed(FOUR_BYTES, about("grad_ND", dtype=dtype)))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        *(("I64", [1, 1], 8), ("U64", [1, 1], 8), ("I16", [1, 1], 2), ("U8", [1, 1], 1), ("BOOL", [1, 1], 1)),
        *(("I8", [1, 1], 1), ("C64", [1, 1], 8), ("F8_E8M0", [1, 1], 1), ("F4", [1, 8], 4), ("F6_E2M3", [1, 8], 6)),
    ],
)
def test_rows_in_a_code_that_the_codec_never_writes_are_refused(dtype: str, shape: list[int], size: int) -> None:
    header, _ = taken_apart(Codec(EXACT).encode(FOUR_BYTES))
    header["grad_ND"] = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    refused(framed(header, bytes(size)))


@pytest.mark.parametrize("shape", [[2, 1], [1, -1], [1, 1.0], ["1", 1], [0, 1], [2**62, 2**62], None, 1])
def test_a_shape_that_does_not_fit_its_numbers_is_refused(shape: object) -> None:
    refused(changed(FOUR_BYTES, about("grad_ND", shape=shape)))


@pytest.mark.parametrize("shape", [[0, 2**63], [2**63, 0], [2**64 - 1, 0]])
def test_a_size_beyond_any_memory_is_refused_even_of_an_empty_tensor(shape: list[int]) -> None:
    header, _ = taken_apart(Codec(EXACT).encode(BodyOutputGrad(0, 0.0, torch.zeros(0, 1))))
    header["grad_ND"]["shape"] = shape
    refused(framed(header))


@pytest.mark.parametrize("offsets", [[0, 3], [0, 5], [1, 5], [4, 0], [0, 2**63], [-4, 0], [0], None])
def test_offsets_that_do_not_fit_are_refused(offsets: object) -> None:
    refused(changed(FOUR_BYTES, about("grad_ND", data_offsets=offsets)))


def test_codes_without_their_scales_are_refused() -> None:
    header, after = taken_apart(Codec(WireSettings(gradient="int8")).encode(BodyOutputGrad(0, 0.0, numbers(3, 4))))
    scales, codes = header.pop("grad_ND#scale")["data_offsets"], header["grad_ND"]["data_offsets"]
    header["grad_ND"]["data_offsets"] = [0, 12]
    assert scales[1] - scales[0] == 12
    refused(framed(header, after[slice(*codes)]))


@pytest.mark.parametrize(
    ("part", "odd"),
    [
        ("grad_ND#width", torch.tensor(33, dtype=torch.int32)),
        ("grad_ND#width", torch.tensor(-5, dtype=torch.int32)),
        ("grad_ND#width", torch.tensor([40], dtype=torch.int32)),
        ("grad_ND#width", torch.tensor(40)),
        ("grad_ND#groups", torch.zeros(3, 1, dtype=torch.uint8)),
        ("grad_ND#groups", torch.zeros(3, 2, dtype=torch.int8)),
        ("grad_ND#scale", torch.zeros(3, 1, dtype=torch.float64)),
        ("grad_ND#scale", torch.zeros(2, 1)),
        ("grad_ND", torch.zeros(3, 21, dtype=torch.uint8)),
        ("grad_ND", torch.zeros((), dtype=torch.uint8)),
        ("grad_ND", torch.zeros(3, 20, dtype=torch.int8)),
        ("grad_ND#width", None),
        ("grad_ND#groups", None),
        ("grad_ND#scale", None),
    ],
)
def test_parts_of_int4_that_do_not_fit_are_refused(part: str, odd: Tensor | None) -> None:
    frame = Codec(WireSettings(gradient="int4")).encode(BodyOutputGrad(0, 0.0, numbers(3, 40)))
    tensors = safetensors.torch.load(frame)
    header = json.loads(frame[8 : 8 + int.from_bytes(frame[:8], "little")])
    if odd is None:
        del tensors[part]
    else:
        tensors[part] = odd
    refused(safetensors.torch.save(tensors, header["__metadata__"]), "grad_ND")


@pytest.mark.parametrize("shape", [[1, 3], [3], [], [1], [3, 1, 1], [4, 1], [1, 1]])
def test_scales_of_another_shape_are_refused(shape: list[int]) -> None:
    header, after = taken_apart(Codec(WireSettings(gradient="int8")).encode(BodyOutputGrad(0, 0.0, numbers(3, 4))))
    codes = after[slice(*header["grad_ND"]["data_offsets"])]
    size = 4 * torch.Size(shape).numel()
    header["grad_ND#scale"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    header["grad_ND"]["data_offsets"] = [size, size + 12]
    refused(framed(header, bytes(size) + codes), re.escape(f"scales of shape {tuple(shape)}"))


def test_scales_beside_numbers_that_are_no_codes_are_refused() -> None:
    header, after = taken_apart(Codec(EXACT).encode(FOUR_BYTES))
    header["grad_ND#scale"] = {"dtype": "F32", "shape": [1, 1], "data_offsets": [4, 8]}
    refused(framed(header, after + bytes(4)))


def test_a_frame_over_the_limit_is_refused_unread() -> None:
    limit = 2**16
    small = Codec(WireSettings(max_message_bytes=limit))
    frame = Codec(EXACT).encode(BodyOutputGrad(0, 0.0, numbers(1, 2**14)))
    with pytest.raises(WireFormatError, match=f"{len(frame)} bytes, the limit is {limit}"):
        small.decode(frame)
    with pytest.raises(WireFormatError, match="the limit is"):
        small.decode(bytes(limit + 1))
    room = (limit - len(Codec(EXACT).encode(BodyOutputGrad(0, 0.0, numbers(1, 1000))))) // 4
    assert isinstance(
        small.decode(Codec(EXACT).encode(BodyOutputGrad(0, 0.0, numbers(1, 1000 + room)))), BodyOutputGrad
    )


def test_an_error_says_that_nothing_is_used() -> None:
    refused(b"", "a frame from the link cannot be read: 0 bytes.*; the frame is dropped")


def test_random_bytes_are_refused() -> None:
    generator = random.Random(5)
    for _ in range(1000):
        refused(generator.randbytes(generator.randrange(300)))
    for _ in range(1000):  # with a length that fits, so that the header is looked at
        refused(framed(generator.randbytes(generator.randrange(60)), generator.randbytes(generator.randrange(60))))


@pytest.mark.parametrize("kind", Message.__subclasses__(), ids=lambda kind: kind.__name__)
def test_a_frame_with_a_wrong_byte_is_refused_or_a_message(kind: type[Message]) -> None:
    generator = random.Random(kind.__name__)
    codec = Codec(WireSettings(adapter="int8"))
    num_refused = 0
    for message in SAMPLES[kind]:
        header, after = taken_apart(codec.encode(message))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors writes it in random order
        frame = framed(header, after)
        for _ in range(400):
            broken = bytearray(frame)
            broken[generator.randrange(len(frame))] ^= generator.randrange(1, 256)
            try:
                assert isinstance(codec.decode(bytes(broken)), Message)
            except WireFormatError:
                num_refused += 1
    assert num_refused > 50
