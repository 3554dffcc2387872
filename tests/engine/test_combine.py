"""Combined adapters against dense float64 matrices, and against peft where it combines, too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapter_files import dense_updates, write_lora, write_peft_folder
from edgepeft.engine.combine.composition import combine
from edgepeft.engine.combine.low_rank import Factors, truncate
from edgepeft.engine.combine.sparse import drop, elect_and_average, trim, truncate_dense
from edgepeft.engine.methods import set_active
from edgepeft.engine.methods.files import read_adapter
from edgepeft.engine.model.load import load_model
from edgepeft.errors import BadInput
from edgepeft.library.combine_client import request_for
from edgepeft.library.combine_parts import averaged_parts, weighted_parts
from edgepeft.library.combined_card import adapter_config
from edgepeft.library.combining import Combined, plan_combination
from edgepeft.models.store import add_model, ensure_model

Q0, Q1, UP = (f"model.layers.{place}" for place in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj"))
IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(5))


def made_from(folder: Path, parts: Any, how: str, **options: Any) -> Combined:
    """Combines in this process into `folder`, with the config that belongs to it."""
    plan = plan_combination("mix", parts, how, **options)
    folder.mkdir()
    made = combine(request_for(plan, folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(plan, made.ranks)))
    return made


def composed(folder: Path, texts: list[str], how: str = "exact", **options: Any) -> Combined:
    return made_from(folder, weighted_parts(texts)[0], how, **options)


def weighted_sum(*terms: tuple[float, Path]) -> dict[str, np.ndarray]:
    total: dict[str, Any] = {}
    for weight, folder in terms:
        for path, update in dense_updates(folder).items():
            total[path] = total.get(path, 0.0) + weight * update
    return total


def assert_same(folder: Path, expected: dict[str, np.ndarray], tolerance: float = 3e-7) -> None:
    found = dense_updates(folder)
    assert found.keys() == expected.keys()
    for path, update in expected.items():
        assert np.linalg.norm(found[path] - update) <= tolerance * np.linalg.norm(update), path


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Adapters that differ in rank, scale and targets."""
    first = write_lora(tmp_path / "first", {Q0: (4, 24, 32), Q1: (4, 24, 32)}, seed=1, lora_alpha=16)
    second = write_lora(
        tmp_path / "second",
        {Q0: (6, 24, 32), UP: (2, 24, 40)},
        seed=2,
        use_rslora=True,
        rank_pattern={"up_proj": 2},
        alpha_pattern={"up_proj": 5},
    )
    third = write_lora(tmp_path / "third", {Q0: (3, 24, 32)}, seed=3, lora_alpha=-2)
    return first, second, third


def test_exact_is_the_weighted_sum_whatever_ranks_targets_and_scales_are(
    tmp_path: Path, mixed: tuple[Path, Path, Path]
) -> None:
    first, second, third = mixed
    made = composed(tmp_path / "mix", [f"{first}=0.7", f"{second}=-0.3", f"{third}"])
    assert_same(tmp_path / "mix", weighted_sum((0.7, first), (-0.3, second), (1.0, third)))
    assert made.ranks == {Q0: 13, Q1: 4, UP: 2}
    assert made.distance < 1e-7
    assert (made.energy_kept, made.least_energy_module) == (None, "")


def test_weights_fold_into_both_factors(tmp_path: Path, mixed: tuple[Path, Path, Path]) -> None:
    first, second, _ = mixed
    composed(tmp_path / "mix", [f"{first}=100", f"{second}=-1"])
    own, result = (load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "mix"))
    for side in "AB":
        key = f"base_model.model.{Q1}.lora_{side}.weight"
        torch.testing.assert_close(result[key], own[key] * math.sqrt(100 * 16 / 4))


def test_more_ranks_than_a_matrix_has_are_cut_without_loss(tmp_path: Path) -> None:
    folders = [write_lora(tmp_path / str(seed), {Q0: (6, 8, 32)}, seed=seed) for seed in range(3)]
    made = composed(tmp_path / "mix", [str(folder) for folder in folders])
    assert made.ranks == {Q0: 8}
    assert_same(tmp_path / "mix", weighted_sum(*((1.0, folder) for folder in folders)), 1e-6)
    assert made.distance < 1e-6


def test_halves_of_precision_are_read_and_float32_is_written(tmp_path: Path, mixed: tuple[Path, Path, Path]) -> None:
    first, _, third = mixed
    halved = {
        key: value.bfloat16() if "lora_A" in key else value.half()
        for key, value in load_file(first / "adapter_model.safetensors").items()
    }
    exact = {key: value.float() for key, value in halved.items()}
    save_file(exact, first / "adapter_model.safetensors")
    expected = weighted_sum((1.0, first), (1.0, third))
    save_file(halved, first / "adapter_model.safetensors")
    composed(tmp_path / "mix", [str(first), str(third)])
    assert_same(tmp_path / "mix", expected)
    assert {value.dtype for value in load_file(tmp_path / "mix/adapter_model.safetensors").values()} == {torch.float32}


def test_svd_keeps_what_the_dense_svd_keeps(tmp_path: Path, mixed: tuple[Path, Path, Path]) -> None:
    first, second, third = mixed
    made = composed(tmp_path / "mix", [f"{first}=0.7", f"{second}=0.3", f"{third}=2"], "svd", rank=5)
    kept, total, shares = 0.0, 0.0, {}
    found = dense_updates(tmp_path / "mix")
    for path, update in weighted_sum((0.7, first), (0.3, second), (2.0, third)).items():
        U, values, Vh = np.linalg.svd(update)
        shares[path] = (values[:5] ** 2).sum() / (values**2).sum()
        kept, total = kept + (values[:5] ** 2).sum(), total + (values**2).sum()
        nearest = (U[:, :5] * values[:5]) @ Vh[:5]
        assert np.linalg.norm(found[path] - nearest) <= 1e-6 * np.linalg.norm(update)
    assert made.energy_kept == pytest.approx(kept / total, rel=1e-10)
    assert made.least_energy_kept == pytest.approx(shares[Q0], rel=1e-10)
    assert (made.least_energy_module, made.worst_module) == (Q0, Q0)
    assert made.distance == pytest.approx(math.sqrt(1 - kept / total), rel=1e-5)
    # A module with a smaller rank keeps it.
    assert made.ranks == {Q0: 5, Q1: 4, UP: 2}


def test_the_rank_is_the_largest_one_by_default(tmp_path: Path, mixed: tuple[Path, Path, Path]) -> None:
    first, second, _ = mixed
    assert max(composed(tmp_path / "mix", [str(first), str(second)], "svd").ranks.values()) == 6


def pefts(tiny_model: Path, folders: list[Path], weights: list[float], **options: Any) -> dict[str, Tensor]:
    """What peft makes of two adapters, under the keys of its files."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], weights, "mix", **options)
    found: dict[str, Tensor] = get_peft_model_state_dict(theirs, adapter_name="mix", save_embedding_layers=False)
    return found


def test_linear_is_pefts_linear(tiny_model: Path, tmp_path: Path) -> None:
    entry = add_model(tiny_model, "tiny")
    folders = [
        write_peft_folder(tmp_path / "a", entry.shape, seed=1, lora_alpha=6),
        write_peft_folder(tmp_path / "b", entry.shape, seed=2, lora_alpha=3),
    ]
    expected = pefts(tiny_model, folders, [0.7, -0.4], combination_type="linear")
    made = composed(tmp_path / "mix", [f"{folders[0]}=0.7", f"{folders[1]}=-0.4"], "linear")
    result = load_file(tmp_path / "mix" / "adapter_model.safetensors")
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-5, atol=1e-6)
    exact, ours = weighted_sum((0.7, folders[0]), (-0.4, folders[1])), dense_updates(tmp_path / "mix")
    between = sum(((ours[path] - exact[path]) ** 2).sum() for path in exact)
    assert made.distance == pytest.approx(math.sqrt(between / sum((x**2).sum() for x in exact.values())), rel=1e-6)
    assert made.distance > 0.5


def dense_ties(updates: list[np.ndarray], density: float) -> np.ndarray:
    """TIES entry by entry, as the paper writes it."""
    trimmed = []
    for update in updates:
        order = np.argsort(-np.abs(update), axis=None)
        kept = np.zeros(update.size)
        kept[order[: round(density * update.size)]] = 1
        trimmed.append(update * kept.reshape(update.shape))
    result = np.zeros_like(updates[0])
    for place in np.ndindex(result.shape):
        values = [update[place] for update in trimmed]
        sign = np.sign(sum(values))
        agreeing = [value for value in values if value != 0 and np.sign(value) == sign]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def test_ties_is_that_of_the_paper_on_the_updates_then_cut(tmp_path: Path, mixed: tuple[Path, Path, Path]) -> None:
    first, second, third = mixed
    made = composed(tmp_path / "mix", [f"{first}=0.7", f"{second}=-0.5", str(third)], "ties", rank=8, density=0.3)
    terms = [(0.7, first), (-0.5, second), (1.0, third)]
    found, kept, total = dense_updates(tmp_path / "mix"), 0.0, 0.0
    for path in found:
        updates = [weight * dense_updates(folder)[path] for weight, folder in terms if path in dense_updates(folder)]
        U, values, Vh = np.linalg.svd(dense_ties(updates, 0.3))
        nearest = (U[:, :8] * values[:8]) @ Vh[:8]
        assert np.linalg.norm(found[path] - nearest) <= 1e-5 * np.linalg.norm(nearest)
        kept, total = kept + (values[:8] ** 2).sum(), total + (values**2).sum()
    assert made.energy_kept == pytest.approx(kept / total, rel=1e-6)
    assert 0.3 < made.energy_kept < 0.95
    assert made.ranks == {Q0: 8, Q1: 8, UP: 8}


def test_ties_with_weights_of_one_is_pefts_on_updates(tiny_model: Path, tmp_path: Path) -> None:
    shape = add_model(tiny_model, "tiny").shape
    folders = [write_peft_folder(tmp_path / name, shape, rank=rank, seed=rank) for name, rank in (("a", 4), ("b", 3))]
    theirs = pefts(tiny_model, folders, [1.0, 1.0], combination_type="ties_svd", svd_rank=6, density=0.25)
    composed(tmp_path / "mix", list(map(str, folders)), "ties", rank=6, density=0.25)
    for path, update in dense_updates(tmp_path / "mix").items():
        A, B = (theirs[f"base_model.model.{path}.lora_{side}.weight"].double() for side in "AB")
        np.testing.assert_allclose(update, (B @ A).numpy(), rtol=0, atol=1e-4 * float(np.abs(update).max()))


def test_ties_without_trimming_or_conflict_is_the_mean(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "a", {Q0: (3, 24, 32)}, seed=1)
    copy = write_lora(tmp_path / "b", {Q0: (3, 24, 32)}, seed=1, lora_alpha=24)
    made = composed(tmp_path / "mix", [str(folder), str(copy)], "ties", rank=3, density=1.0)
    assert_same(tmp_path / "mix", {path: 2 * update for path, update in dense_updates(folder).items()}, 1e-6)
    assert made.energy_kept == pytest.approx(1.0)


def test_dare_drops_and_rescales_before_it_sums(tmp_path: Path, mixed: tuple[Path, Path, Path]) -> None:
    first, second, _ = mixed
    made = composed(tmp_path / "mix", [f"{first}=0.7", f"{second}=0.3"], "dare", rank=24, density=0.6, seed=7)
    found = dense_updates(tmp_path / "mix")
    a, b = 0.7 * dense_updates(first)[Q0] / 0.6, 0.3 * dense_updates(second)[Q0] / 0.6
    # At full rank each entry is one of four sums: of what was kept and what was dropped.
    choices = np.stack([np.zeros_like(a), a, b, a + b])
    distances = np.abs(choices - found[Q0])
    assert distances.min(0).max() < 1e-4
    shares = [(distances.argmin(0) == which).mean() for which in range(4)]
    assert shares == pytest.approx([0.16, 0.24, 0.24, 0.36], abs=0.06)
    assert made.energy_kept == pytest.approx(1.0)
    again = composed(tmp_path / "again", [f"{first}=0.7", f"{second}=0.3"], "dare", rank=24, density=0.6, seed=7)
    assert again == made
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        tmp_path / "mix/adapter_model.safetensors"
    ).read_bytes()
    composed(tmp_path / "other", [f"{first}=0.7", f"{second}=0.3"], "dare", rank=24, density=0.6, seed=8)
    assert not np.allclose(dense_updates(tmp_path / "other")[Q0], found[Q0], atol=1e-3)


def test_dropping_keeps_the_expected_value() -> None:
    update = torch.ones(64, 64)
    mean = torch.stack([drop(update, 0.2, seed, 0, "m") for seed in range(200)]).mean(0)
    assert mean.mean() == pytest.approx(1.0, abs=0.01)
    assert set(drop(update, 0.25, 0, 0, "m").unique().tolist()) == {0.0, 4.0}
    assert not torch.equal(drop(update, 0.5, 0, 0, "m"), drop(update, 0.5, 0, 1, "m"))
    assert torch.equal(drop(update, 1.0, 0, 0, "m"), update)


def test_trimming_keeps_the_largest_and_at_least_one() -> None:
    update = torch.tensor([[3.0, -5.0, 1.0], [0.0, 2.0, -4.0]])
    assert trim(update, 0.5).tolist() == [[3.0, -5.0, 0.0], [0.0, 0.0, -4.0]]
    assert trim(update, 0.01).tolist() == [[0.0, -5.0, 0.0], [0.0, 0.0, 0.0]]
    assert torch.equal(trim(update, 1.0), update)


def test_signs_are_elected_by_their_sum() -> None:
    updates = [torch.tensor([2.0, 1.0, 0.0, 1.0]), torch.tensor([-1.0, 3.0, 0.0, -1.0])]
    assert elect_and_average(updates).tolist() == [2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(("rows", "columns"), [(30, 50), (50, 30), (40, 40)])
def test_a_dense_matrix_is_cut_as_its_svd_cuts_it(rows: int, columns: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    cut = truncate_dense(matrix, 7)
    U, values, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(cut.factors.B @ cut.factors.A, (U[:, :7] * values[:7]) @ Vh[:7], rtol=1e-9, atol=1e-9)
    assert cut.kept == pytest.approx(float(values[:7].square().sum()))
    assert cut.energy == pytest.approx(float(values.square().sum()))


def test_a_large_matrix_is_cut_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepeft.engine.combine.sparse.EXACT_SIDE", 0)
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(300, 8, generator=generator) @ torch.randn(8, 400, generator=generator)
    for matrix in (signal + torch.randn(300, 400, generator=generator), trim(signal, 0.2)):
        cut = truncate_dense(matrix, 8)
        best = float(torch.linalg.svdvals(matrix.double())[:8].square().sum())
        assert best * 0.999 < cut.kept <= best * (1 + 1e-6)
        product = cut.factors.B @ cut.factors.A
        assert float((matrix - product).square().sum()) == pytest.approx(cut.energy - cut.kept, rel=1e-4)


def test_an_update_of_higher_rank_than_its_matrix_is_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12, 5), (9, 12)))
    cut = truncate(Factors(A, B), 12)
    assert cut.factors.rank == 5
    torch.testing.assert_close(cut.factors.B @ cut.factors.A, B @ A)


def test_averages_weigh_by_samples_and_are_exact(tmp_path: Path) -> None:
    folders = [write_lora(tmp_path / str(seed), {Q0: (3, 24, 32)}, seed=seed, lora_alpha=seed + 1) for seed in range(3)]
    parts = averaged_parts(
        [f"{folder}:{count}" for folder, count in zip(folders, (100, 300, 600), strict=True)], "samples"
    )
    assert [part.weight for part in parts] == [0.1, 0.3, 0.6]
    made = made_from(tmp_path / "mix", parts, "exact")
    assert_same(tmp_path / "mix", weighted_sum(*zip((0.1, 0.3, 0.6), folders, strict=True)))
    assert made.ranks == {Q0: 9}


def test_factors_are_averaged_as_fedavg_does_and_differ_from_the_mean(tmp_path: Path) -> None:
    folders = [write_lora(tmp_path / str(seed), {Q0: (3, 24, 32)}, seed=seed) for seed in range(2)]
    parts = averaged_parts([f"{folders[0]}:1", f"{folders[1]}:3"], "samples")
    made = made_from(tmp_path / "mix", parts, "factors")
    own = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    A, B = (
        0.25 * own[0][f"base_model.model.{Q0}.lora_{side}.weight"].double()
        + 0.75 * own[1][f"base_model.model.{Q0}.lora_{side}.weight"].double()
        for side in "AB"
    )
    plain = (8 / 3 * B @ A).numpy()
    assert_same(tmp_path / "mix", {Q0: plain}, 1e-6)
    exact = weighted_sum((0.25, folders[0]), (0.75, folders[1]))[Q0]
    assert made.distance == pytest.approx(np.linalg.norm(plain - exact) / np.linalg.norm(exact), rel=1e-6)
    assert made.distance > 0.3
    # With one A for all, as in FFA-LoRA, the average of the factors is the average of the updates.
    shared = {**own[1], f"base_model.model.{Q0}.lora_A.weight": own[0][f"base_model.model.{Q0}.lora_A.weight"]}
    save_file(shared, folders[1] / "adapter_model.safetensors")
    parts = averaged_parts([f"{folders[0]}:1", f"{folders[1]}:3"], "samples")
    assert made_from(tmp_path / "shared", parts, "factors").distance < 1e-6


def logits_here(tiny_model: Path, folder: Path) -> Tensor:
    loaded = load_model(
        ensure_model(str(tiny_model)), precision="fp32", compute_dtype="fp32", device=torch.device("cpu")
    )
    read_adapter(folder, loaded, "mix")
    set_active(loaded, [("mix", 1.0)])
    with torch.no_grad():
        found: Tensor = loaded.model(IDS).logits
    return found


@pytest.mark.parametrize(("how", "options"), [("exact", {}), ("svd", {"rank": 3}), ("ties", {"rank": 5})])
def test_a_combined_adapter_gives_the_same_logits_here_and_in_peft(
    tiny_model: Path, tmp_path: Path, how: str, options: dict[str, Any]
) -> None:
    shape = add_model(tiny_model, "tiny").shape
    first = write_peft_folder(tmp_path / "a", shape, rank=4, seed=1, lora_alpha=0.04)
    second = write_lora(
        tmp_path / "b",
        {f"model.layers.1.{x.name}": (2, x.in_features, x.out_features) for x in shape.linears if "mlp" in x.name},
        seed=2,
        lora_alpha=0.03,
        use_rslora=True,
        target_modules=["up_proj", "down_proj", "gate_proj"],
        layers_to_transform=[1],
    )
    composed(tmp_path / "mix", [f"{first}=0.7", f"{second}=-0.9"], how, **options)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        plain = base(IDS).logits
    twin = PeftModel.from_pretrained(base, tmp_path / "mix").eval()
    with torch.no_grad():
        theirs = twin(IDS).logits
    torch.testing.assert_close(logits_here(tiny_model, tmp_path / "mix"), theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, theirs, atol=1e-2)
    if how == "exact":
        both = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        for path, update in weighted_sum((0.7, first), (-0.9, second)).items():
            both.get_submodule(path).weight.data += torch.from_numpy(update).float()
        with torch.no_grad():
            torch.testing.assert_close(theirs, both(IDS).logits, rtol=1e-4, atol=1e-4)


def change(folder: Path, key: str, value: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    tensors[key].view(-1)[3] = value
    save_file(tensors, folder / "adapter_model.safetensors")


def test_what_cannot_be_combined_is_told_and_nothing_is_written(tmp_path: Path, mixed: tuple[Path, Path, Path]) -> None:
    first, second, third = mixed
    with pytest.raises(BadInput, match="float32"):
        composed(tmp_path / "huge", [f"{first}=1e90", str(second)])
    with pytest.raises(BadInput, match="change nothing"):
        composed(tmp_path / "tiny", [f"{first}=1e-120", f"{second}=1e-120"])
    copy = write_lora(tmp_path / "copy", {Q0: (3, 24, 32)}, seed=3, lora_alpha=-4)
    with pytest.raises(BadInput, match="cancel each other"):
        composed(tmp_path / "nothing", [f"{third}=1", f"{copy}=-0.5"])
    for value in (float("nan"), float("inf")):
        change(first, f"base_model.model.{Q1}.lora_B.weight", value)
        with pytest.raises(BadInput, match=r"layers\.1\.self_attn\.q_proj\.lora_B\.weight of .*not finite"):
            composed(tmp_path / f"of-{value}", [str(first), str(second)])
    assert not [file for file in tmp_path.rglob("*.safetensors") if file.parent not in (*mixed, copy)]
