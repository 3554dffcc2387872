"""Stored copies of quantized linears as the light side sees them: judged by their headers, shown, sized and removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from edgepeft.cli.app import app
from edgepeft.hardware.measured import Measured, store_measured
from edgepeft.hardware.packages import read_packages
from edgepeft.models.discovery import scan
from edgepeft.models.headers import read_file_header
from edgepeft.models.quantized_copy import (
    METADATA_KEY,
    CopyUnusableError,
    copy_path,
    copy_settings,
    find_copy,
    list_copies,
    read_copy_header,
    usable_copy_bytes,
)
from edgepeft.models.store import ModelEntry, add_model, list_models, remove_model, verify_unchanged
from edgepeft.plan.search import make_plan
from edgepeft.plan.speed import QUANTIZED_WEIGHTS_PER_S, READ_BYTES_PER_S, START_SECONDS, load_seconds
from plans import device, request
from plans import entry as planned_entry
from shapes import SMOLLM2, run_spec
from tiny import write_tiny_model


@pytest.fixture
def base(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model)


def write_copy(entry: Any, precision: str = "nf4", kind: Any = "cpu", **changes: Any) -> Path:
    """A file with one tensor that says to be the copy of `entry`; `changes` go into its settings."""
    settings = copy_settings(entry, precision, kind)
    assert settings is not None
    path = copy_path(entry, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    words = {METADATA_KEY: msgspec.json.encode(msgspec.to_builtins(settings) | changes).decode()}
    save_file({"w": np.zeros(5000, np.uint8)}, str(path), metadata=words)
    return path


def told(*arguments: str) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def shown(name: str) -> str:
    """The line of `models show` about copies."""
    (line,) = [line for line in told("models", "show", name).splitlines() if "quantized copies" in line]
    return line.split("quantized copies")[1].strip()


def test_a_copy_belongs_to_a_precision_a_device_and_a_source_in_16_or_32_bit(base: ModelEntry) -> None:
    paths = set()
    for precision in ("nf4", "int8"):
        for kind in ("cpu", "cuda"):
            settings = copy_settings(base, precision, kind)
            assert settings is not None
            assert (settings.fingerprint, settings.precision) == (base.fingerprint, precision)
            paths.add(copy_path(base, settings))
    assert len(paths) == 4
    assert all(Path(base.folder) in path.parents and Path(base.weights) not in path.parents for path in paths)
    assert copy_settings(base, "bf16", "cpu") is None
    for form in ("bnb-4bit", "bnb-8bit", "fp8", "mxfp4"):
        assert copy_settings(msgspec.structs.replace(base, stored_as=form), "nf4", "cpu") is None
    assert copy_settings(msgspec.structs.replace(base, folder=""), "nf4", "cpu") is None


def test_none_is_found_where_none_was_made(base: ModelEntry) -> None:
    assert list_copies(base) == []
    assert find_copy(base, "nf4", "cpu") is None
    assert usable_copy_bytes(base, "nf4", "cpu") is None
    settings = copy_settings(base, "nf4", "cpu")
    assert settings is not None
    assert read_copy_header(copy_path(base, settings), settings) is None


def test_a_good_one_is_found_with_its_size(base: ModelEntry) -> None:
    path = write_copy(base)
    (found,) = list_copies(base)
    assert (found.path, found.precision, found.device, found.problem) == (path, "nf4", "cpu", "")
    assert found.size_bytes == path.stat().st_size == usable_copy_bytes(base, "nf4", "cpu")
    assert usable_copy_bytes(base, "nf4", "cuda") is None
    header = read_file_header(path)
    assert [(tensor.name, tensor.shape, tensor.begin) for tensor in header.tensors] == [("w", (5000,), 0)]
    assert header.data_end - header.data_begin == 5000


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fingerprint": "sha256:0"}, "made from other weights"),
        ({"block": 128, "absmax_block": 64}, "another block and absmax_block"),
        ({"format": 0}, "another format"),
        ({"quant_type": 4}, "does not say what it was made from"),
    ],
)
def test_another_source_or_setting_is_a_problem(base: ModelEntry, change: dict[str, Any], why: str) -> None:
    path = write_copy(base, **change)
    (found,) = list_copies(base)
    assert why in found.problem
    assert found.size_bytes == path.stat().st_size
    assert usable_copy_bytes(base, "nf4", "cpu") is None


@pytest.mark.parametrize("kept", [0, 5, 100, 5000])
def test_a_cut_file_is_a_problem(base: ModelEntry, kept: int) -> None:
    path = write_copy(base)
    path.write_bytes(path.read_bytes()[:kept])
    settings = copy_settings(base, "nf4", "cpu")
    assert settings is not None
    with pytest.raises(CopyUnusableError, match=r"cut short|only the beginning"):
        read_copy_header(path, settings)
    assert usable_copy_bytes(base, "nf4", "cpu") is None


def test_models_show_tells_of_copies(base: ModelEntry) -> None:
    assert json.loads(told("models", "show", base.name, "--json"))["quantized_copies"] == []
    assert shown(base.name).startswith("none; the first load in nf4 or int8 stores one")
    path = write_copy(base)
    write_copy(base, "int8", block=3)
    size = path.stat().st_size
    nf4, int8 = json.loads(told("models", "show", base.name, "--json"))["quantized_copies"]
    assert nf4 == {"precision": "nf4", "device": "cpu", "bytes": size, "path": str(path), "problem": None}
    assert int8["problem"] == "it was made with another block"
    line = shown(base.name)
    assert line.startswith("nf4 for the CPU 5.")
    assert line.endswith("to be made anew: it was made with another block")


def test_a_source_that_is_quantized_itself_gets_none(tiny_model: Path) -> None:
    entry = add_model(tiny_model)
    path = Path(entry.folder) / "entry.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stored_as": "bnb-4bit"}))
    assert shown(entry.name) == "none: the source is quantized itself"


@pytest.mark.parametrize("copied", [False, True])
def test_it_is_no_part_of_the_weights_and_goes_with_the_model(tiny_model: Path, copied: bool) -> None:
    entry = add_model(tiny_model, copy=copied)
    before = json.loads(told("where", "--json"))["models"]["bytes"]
    path = write_copy(entry)
    verify_unchanged(entry)
    assert list_models() == [entry]
    assert add_model(tiny_model, copy=copied) == entry
    assert path.is_file()
    assert json.loads(told("where", "--json"))["models"]["bytes"] == before + path.stat().st_size
    assert json.loads(told("models", "list", "--json"))[0]["weights_bytes"] == entry.weights_bytes
    assert not [model for model in scan([Path(entry.folder)]) if "quantized" in model.path]
    told("cache", "clear")
    assert path.is_file()
    remove_model(entry.name)
    assert not Path(entry.folder).exists()
    assert (tiny_model / "model.safetensors").is_file()


def test_a_model_that_is_added_anew_loses_it(tiny_model: Path) -> None:
    entry = add_model(tiny_model)
    path = write_copy(entry)
    remove_model(entry.name)
    write_tiny_model(tiny_model, seed=1)
    assert add_model(tiny_model).name == entry.name
    assert not path.exists()


def test_a_load_from_a_copy_takes_no_time_to_quantize(tmp_path: Path) -> None:
    spec = run_spec(precision="nf4")
    linears = SMOLLM2.layers * SMOLLM2.linear_parameters_per_layer
    weights = 2 * SMOLLM2.parameters
    first = load_seconds(spec, SMOLLM2, device(), weights)
    second = load_seconds(spec, SMOLLM2, device(), weights, 55_000_000)
    assert first == pytest.approx(START_SECONDS + weights / READ_BYTES_PER_S + linears / QUANTIZED_WEIGHTS_PER_S["cpu"])
    others = weights - 2 * linears
    assert second == pytest.approx(START_SECONDS + (55_000_000 + others) / READ_BYTES_PER_S, rel=1e-6)
    assert second < first - 1


def test_a_plan_knows_of_the_copy(tmp_path: Path) -> None:
    flops = 2e12
    torch = read_packages().torch or ""
    store_measured(Measured("cpu", "CPU", torch, "2026-11-24T10:00:00+00:00", flops, "bf16", 1e10, None, None, None))
    base = planned_entry(folder=str(tmp_path), weights_bytes=2 * SMOLLM2.parameters)

    def seconds(**options: Any) -> float:
        found = make_plan(request(lengths=[100] * 50, base=base, precision="nf4", **options)).seconds
        assert found is not None
        return found

    before, elsewhere = seconds(), seconds(on=device("cuda", present=False, tensor_flops=flops))
    write_copy(base, "nf4")
    write_copy(base, "nf4", "cuda")
    assert seconds() < before - 1
    assert seconds(on=device("cuda", present=False, tensor_flops=flops)) == elsewhere
