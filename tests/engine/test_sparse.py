"""Sparse adapters beside what every method is tried for: which entries, files, SHiRA, the choice before a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgepeft.engine.methods import AttachedAdapter, attach, set_active
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.methods.sparse import SparseUpdate
from edgepeft.engine.methods.sparse_choice import Candidates, blocks_of, by_chance
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.training import choosing
from edgepeft.errors import BadInput
from edgepeft.library.parent import find_parent
from edgepeft.library.store import resolve_adapter
from edgepeft.methods import sparse as light
from edgepeft.methods.sparse import SparseConfig
from edgepeft.models.store import ensure_model
from edgepeft.plan.build import build
from edgepeft.runs.control import request
from edgepeft.runs.events import PhaseChanged, StepDone
from training_runs import of_type, tiny_base, tiny_run, train

CPU = torch.device("cpu")
IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(5))


def load(folder: Path, precision: Any = "fp32", compute: Any = "fp32") -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision=precision, compute_dtype=compute, device=CPU)


def logits(loaded: LoadedModel, *active: tuple[str, float]) -> Tensor:
    set_active(loaded, active)
    with torch.no_grad():
        out: Tensor = loaded.model(IDS).logits
    return out


def move(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


def updates(adapter: AttachedAdapter) -> dict[str, SparseUpdate]:
    found = {path: update for path, update in adapter.updates.items() if isinstance(update, SparseUpdate)}
    assert found.keys() == adapter.updates.keys()
    return found


# Which entries --------------------------------------------------------------------------------------------------------


def test_largest_magnitudes_are_chosen(tiny_model: Path) -> None:
    loaded = load(tiny_model, "nf4", "bf16")
    adapter = attach(loaded, "a", SparseConfig(density=0.03, choose="magnitude"), seed=0)
    for path, update in updates(adapter).items():
        weight = loaded.linears()[path].weight_source
        values = weight.materialize(torch.empty(weight.shape, dtype=torch.bfloat16)).abs().view(-1)
        count = round(0.03 * values.numel())
        assert update.places.dtype == torch.int32
        assert update.places.numel() == count
        assert torch.equal(update.places, update.places.unique())
        # Of equal ones it may be any.
        assert torch.equal(values[update.places.long()].sort().values, values.sort().values[-count:])


@pytest.mark.parametrize("count", [1, 7, 100, 1000, 2048])
def test_places_by_chance_are_distinct_and_sorted_and_depend_on_seed_and_name(count: int) -> None:
    places = by_chance(count, (64, 32), 3, "a", CPU)
    assert places.dtype == torch.int32
    assert places.numel() == count
    assert bool((places[1:] > places[:-1]).all())
    assert 0 <= int(places[0]) <= int(places[-1]) < 2048
    assert torch.equal(places, by_chance(count, (64, 32), 3, "a", CPU))
    if count < 2048:
        assert not torch.equal(places, by_chance(count, (64, 32), 3, "b", CPU))
        assert not torch.equal(places, by_chance(count, (64, 32), 4, "a", CPU))


@pytest.mark.parametrize("count", [13, 37])
def test_every_entry_is_chosen_about_as_often_as_every_other(count: int) -> None:
    counts = torch.zeros(60)
    for seed in range(2000):
        counts[by_chance(count, (6, 10), seed, "a", CPU).long()] += 1
    share = counts / (2000 * count / 60)
    assert float(share.min()) > 0.8
    assert float(share.max()) < 1.2


@pytest.mark.parametrize("block", [1 << 22, 40, 3], ids=["one block", "blocks of rows", "blocks of a row"])
def test_candidates_are_the_largest_sums_of_magnitudes(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(light, "GRADIENT_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    out, features, samples = 12, 10, 6
    # What is large in one sample is large in all, so nothing of it is missed.
    strong = 1 + 9 * (torch.rand(out, generator=generator) < 0.4).float()
    found, sums = Candidates(20, (out, features), CPU), torch.zeros(out, features)
    for _ in range(samples):
        x = torch.randn(5, features, generator=generator)
        g = torch.randn(5, out, generator=generator) * strong
        found.see(x, g)
        sums += (g.t() @ x).abs()
    chosen = found.chosen()
    assert chosen is not None
    assert chosen.dtype == torch.int32
    assert bool((chosen[1:] > chosen[:-1]).all())
    best = sums.view(-1).topk(20).indices
    assert len(set(chosen.tolist()) & set(best.tolist())) >= 18
    everything = Candidates(out * features, (out, features), CPU)
    everything.see(x, g)
    places = everything.chosen()
    assert places is not None
    assert torch.equal(places, torch.arange(120).int())


def test_one_sample_gives_exactly_its_largest_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(5, 10, generator=generator), torch.randn(5, 12, generator=generator)
    found = Candidates(20, (12, 10), CPU)
    assert found.chosen() is None
    found.see(x, g)
    chosen = found.chosen()
    assert chosen is not None
    assert set(chosen.tolist()) == set((g.t() @ x).abs().view(-1).topk(20).indices.tolist())


@pytest.mark.parametrize("block", [1 << 22, 256, 100])
def test_gradients_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(light, "GRADIENT_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    places = by_chance(99, (64, 32), 0, "a", CPU)
    assert len(blocks_of((64, 32), places)) == -(-64 // min(64, max(1, block // 32)))
    update = SparseUpdate(places, (64, 32), None)  # type: ignore[arg-type]
    x, g = torch.randn(9, 32, generator=generator), torch.randn(9, 64, generator=generator)
    (found,) = update.add_backward(x, g, None, 0.5, ())
    assert found is not None
    torch.testing.assert_close(found, 0.5 * (g.t() @ x).view(-1)[places.long()], rtol=1e-5, atol=1e-6)
    # Other places of the same tensor are noticed.
    places.copy_(by_chance(99, (64, 32), 1, "a", CPU))
    (found,) = update.add_backward(x, g, None, 1.0, ())
    assert found is not None
    torch.testing.assert_close(found, (g.t() @ x).view(-1)[places.long()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("precision", "compute"), [("fp32", "fp32"), ("bf16", "bf16"), ("nf4", "bf16")])
def test_few_rows_are_multiplied_without_a_dense_sum(tiny_model: Path, precision: Any, compute: Any) -> None:
    loaded = load(tiny_model, precision, compute)
    adapter = attach(loaded, "a", SparseConfig(density=0.1), seed=1)
    move(adapter.named_parameters().values())
    set_active(loaded, [("a", 0.5)])
    for linear in list(loaded.linears().values())[:7]:
        x = torch.randn(9, linear.in_features, generator=torch.Generator().manual_seed(0)).to(loaded.workspace.dtype)
        with torch.inference_mode():
            whole, formed = linear.alone(x), loaded.workspace.nbytes
            few = torch.cat([linear.alone(x[:1]), linear.alone(x[1:4]), linear.alone(x[4:5].view(1, 1, -1))[0]])
        assert loaded.workspace.nbytes == formed
        tolerance = 1e-5 if compute == "fp32" else 1e-2
        assert float((few - whole[:5]).norm()) < tolerance * float(whole.norm())


# Files ----------------------------------------------------------------------------------------------------------------


def test_shiras_file_gives_pefts_logits_and_gradients_and_ours_loads_there(tiny_model: Path, tmp_path: Path) -> None:
    settings = ShiraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], random_seed=3)
    settings.task_type = "CAUSAL_LM"
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), settings).eval()
    move(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(tiny_model)
    adapter = read_adapter(tmp_path / "theirs", loaded, "t")
    assert adapter.config == SparseConfig(rank=2, choose="random", targets=("down_proj", "q_proj", "v_proj"))
    set_active(loaded, [("t", 1.0)])
    outs = [model(input_ids=IDS, labels=IDS) for model in (theirs, loaded.model)]
    torch.testing.assert_close(outs[1].logits, outs[0].logits, rtol=1e-5, atol=1e-5)
    for out in outs:
        out.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    own = adapter.named_parameters()
    assert len(own) == len(gradients) == 6
    for name, parameter in own.items():
        wanted = gradients[f"base_model.model.{name.replace('sparse_values', 'shira_weight')}.default"]
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
    save_adapter(tmp_path / "ours", adapter, "tiny")
    for name in ("theirs", "ours"):
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        if name == "theirs":
            expected = stored
    assert stored.keys() == expected.keys()
    assert all(
        torch.equal(value, expected[key]) and value.dtype == expected[key].dtype for key, value in stored.items()
    )
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    back = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(IDS).logits, outs[0].logits.detach(), rtol=1e-5, atol=1e-5)


def test_places_in_any_order_are_read(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", SparseConfig(rank=2, choose="random", targets=("k_proj",)), seed=0)
    move(adapter.named_parameters().values())
    expected = logits(loaded, ("a", 1.0))
    save_adapter(tmp_path, adapter, "tiny")
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    for key in [key for key in stored if key.endswith("shira_weight")]:
        order = torch.randperm(stored[key].numel(), generator=torch.Generator().manual_seed(0))
        places = key.replace("shira_weight", "shira_indices")
        stored[key], stored[places] = stored[key][order], stored[places][:, order].float()
    save_file(stored, path)
    read_adapter(tmp_path, loaded, "b")
    assert torch.equal(logits(loaded, ("b", 1.0)), expected)


def test_our_own_file_keeps_places_in_four_bytes(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", SparseConfig(density=0.02), seed=0)
    save_adapter(tmp_path, adapter, "tiny")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "EDGEPEFT_SPARSE"
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32, torch.int32}
    assert sum(value.nbytes for value in stored.values()) == 8 * sum(len(u.places) for u in updates(adapter).values())


def damage(change: Callable[[Tensor], Tensor], ending: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        key = next(key for key in tensors if key.endswith(ending))
        tensors[key] = change(tensors[key].clone()).contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


def put(index: Any, value: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


OWN, SHIRA = SparseConfig(density=0.02), SparseConfig(rank=2)


@pytest.mark.parametrize(
    ("config", "harm", "message"),
    [
        (OWN, damage(put(-1, 1 << 20), "places"), "sparse_places names places outside of the matrix, or one twice"),
        (OWN, damage(put(0, -1), "places"), "names places outside"),
        (OWN, damage(put(1, 0), "places"), "names places outside"),
        (OWN, damage(Tensor.float, "places"), "sparse_places holds no whole numbers"),
        (OWN, damage(lambda x: x[1:], "places"), "this model needs"),
        (OWN, damage(Tensor.int, "values"), "sparse_values holds values that are not finite numbers"),
        (OWN, settings(edgepeft={"type": "sparse", "density": 2}), "density of 2 is not possible"),
        (OWN, settings(edgepeft=None), "Expected `object`"),
        (SHIRA, damage(put((0, 0), 1 << 20), "indices"), "names places outside of the matrix"),
        (SHIRA, damage(put((1, 0), 1 << 20), "indices"), "shira_indices names places outside of the matrix"),
        (SHIRA, damage(lambda x: x[:, :1].expand(-1, x.shape[1]), "indices"), "or one twice"),
        (SHIRA, damage(lambda x: x[0], "indices"), "is missing"),
        (SHIRA, settings(r=3), "this model needs"),
        (SHIRA, settings(r=30), "rank 30 stands for"),
        (SHIRA, settings(r="2"), "r must be a whole number"),
        (SHIRA, settings(r=0), "r must be a whole number"),
        (SHIRA, settings(target_modules="all-linear"), "target_modules must be a list"),
        (SHIRA, settings(target_modules=["wo"]), "target 'wo' matches no linear"),
    ],
)
def test_a_damaged_adapter_is_refused_and_nothing_is_attached(
    tiny_model: Path, tmp_path: Path, config: SparseConfig, harm: Callable[[Path], None], message: str
) -> None:
    loaded = load(tiny_model)
    save_adapter(tmp_path, attach(loaded, "a", config, seed=0), "tiny")
    harm(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        read_adapter(tmp_path, loaded, "b")
    assert "\n" not in str(caught.value)
    assert not any("b" in site.adapters for site in loaded.sites().values())


# Before a run ---------------------------------------------------------------------------------------------------------


def places_of(folder: Path) -> dict[str, Tensor]:
    return {key: value for key, value in load_file(folder).items() if key.endswith("sparse_places")}


def test_a_run_chooses_once_whatever_its_layout_and_goes_on_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path)
    options: dict[str, Any] = {"method": SparseConfig(density=0.02), "checkpoint_steps": 1, "max_steps": 4}
    seen: list[int] = []
    exact = Candidates.see

    def see(self: Candidates, x: Tensor, g: Tensor) -> None:
        seen.append(x.shape[0])
        exact(self, x, g)

    monkeypatch.setattr(Candidates, "see", see)
    first = tiny_run(tmp_path, base, "first", **options)

    def stop(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            request(first, "stop")

    events = train(first, stop)
    told = [event.detail for event in of_type(events, PhaseChanged) if "choosing" in event.detail]
    assert told == [f"choosing entries by the gradients of {min(choosing.LOOKED_AT, len(seen) // 14)} samples"]
    looks = len(seen)
    assert looks
    train(first)
    assert len(seen) == looks
    chosen = places_of(first.path / "adapter" / "adapter_model.safetensors")
    assert len(chosen) == 14
    other = tiny_run(tmp_path, base, "other", micro_batch_tokens=48, checkpointing="none", **options)
    train(other)
    found = places_of(other.path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in chosen.items())
    loaded = load_model(base, precision="fp32", compute_dtype="fp32", device=CPU)
    drawn = attach(loaded, "a", SparseConfig(density=0.02), seed=0).named_places()
    assert not any(torch.equal(value, chosen[f"base_model.model.{key}"]) for key, value in drawn.items())


def test_a_run_that_is_stopped_while_it_looks_chooses_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path)
    options: dict[str, Any] = {"method": SparseConfig(density=0.02), "max_steps": 3}
    whole, parts = tiny_run(tmp_path, base, "whole", **options), tiny_run(tmp_path, base, "parts", **options)
    train(whole)
    exact, seen = Candidates.see, []

    def see(self: Candidates, x: Tensor, g: Tensor) -> None:
        seen.append(1)
        if len(seen) == 20:
            request(parts, "stop")
        exact(self, x, g)

    monkeypatch.setattr(Candidates, "see", see)
    events = train(parts)
    assert not of_type(events, StepDone)
    assert 20 <= len(seen) <= 2 * 14
    train(parts)
    first, second = (run.path / "adapter" / "adapter_model.safetensors" for run in (whole, parts))
    assert first.read_bytes() == second.read_bytes()


def test_chosen_entries_are_those_with_large_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(tmp_path)
    sums: dict[int, Tensor] = {}
    exact = Candidates.see

    def see(self: Candidates, x: Tensor, g: Tensor) -> None:
        sums[id(self)] = sums.get(id(self), 0) + (g.t() @ x).abs().view(-1)
        exact(self, x, g)

    monkeypatch.setattr(Candidates, "see", see)
    run = tiny_run(tmp_path, base, "r", method=SparseConfig(density=0.02), max_steps=1)
    train(run)
    chosen = places_of(run.path / "adapter" / "adapter_model.safetensors")
    # Backward meets the linears in another order than files have them.
    for gradients in sums.values():
        largest = [value for value in chosen.values() if round(0.02 * gradients.numel()) == value.numel()]
        shares = [
            float(gradients[places.long()].sum() / gradients.topk(places.numel()).values.sum()) for places in largest
        ]
        assert max(shares) > 0.97


def test_a_continuation_keeps_the_places_and_looks_at_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(tmp_path)
    train(tiny_run(tmp_path, base, "tiny", method=SparseConfig(density=0.02), max_steps=2))
    parent = find_parent("tiny@v1", base)
    assert parent.method == SparseConfig(density=0.02)
    planned = build(base.name, tmp_path / "data.jsonl", {"gpu": "cpu", "from_": "tiny"})
    assert planned.spec.recipe.method == parent.method
    assert {choice.why for choice in planned.choices if choice.what == "density"} == {"as tiny@v1 has it"}
    monkeypatch.setattr(Candidates, "see", lambda *_: pytest.fail("it looked again"))
    train(tiny_run(tmp_path, base, "tiny", method=parent.method, parent=parent.ref, max_steps=2))
    first, second = (load_file(resolve_adapter(name).weights) for name in ("tiny@v1", "tiny@v2"))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) is key.endswith("sparse_places"), key
