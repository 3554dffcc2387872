"""A chat's memory with its adapters: what a file's header tells is what is held, and what does not fit is not taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgepeft.chat.protocol import AdapterUse, Sampling
from edgepeft.engine.inference.generate import generate
from edgepeft.engine.inference.session import Session
from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.methods import attach, detach, set_active
from edgepeft.engine.methods.files import save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.errors import DoesNotFit
from edgepeft.memory.chat import adapter_bytes
from edgepeft.methods import LoraConfig
from edgepeft.methods.bias import BiasConfig
from edgepeft.methods.bottleneck import BottleneckConfig
from edgepeft.methods.compacter import CompacterConfig
from edgepeft.methods.full import FullConfig
from edgepeft.methods.ia3 import Ia3Config
from edgepeft.methods.norm import NormConfig
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.methods.sparse import SparseConfig
from edgepeft.models.headers import read_header
from edgepeft.models.store import ensure_model
from tiny import write_tiny_model

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, max_new_tokens=4)
PROMPT = [10, 20, 30, 40]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(rank=4),
    "lora of rank 1": LoraConfig(rank=1),
    "dora": LoraConfig(rank=4, dora=True),
    "houlsby": BottleneckConfig(reduction=8),
    "compacter": CompacterConfig(reduction=4, products=4, rank=2),
    "ia3": Ia3Config(),
    "norm": NormConfig(),
    "bias": BiasConfig(),
    "sparse": SparseConfig(density=0.05, choose="random"),
    "sparse as PEFT has it": SparseConfig(rank=2, choose="random", targets=("q_proj", "down_proj")),
    "prefix": PrefixConfig(5),
    "prompt": PromptConfig(5),
    "full": FullConfig(),
}


def load(folder: Path, dtype: Any = "fp32") -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision=dtype, compute_dtype=dtype, device=CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", biased=True, tie_word_embeddings=False)


def made(loaded: LoadedModel, folder: Path, config: Any, seed: int = 1) -> AdapterUse:
    adapter = attach(loaded, "made", config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    save_adapter(folder, adapter, "tiny")
    detach(loaded, "made")
    return AdapterUse(str(folder))


def held_by(session: Session) -> int:
    """Bytes of the tensors of all adapters that are there, each once."""
    storages: dict[int, int] = {}
    for site in session.loaded.sites().values():
        for update in site.adapters.values():
            for tensor in _tensors_in(update, set()):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    own = {tensor.untyped_storage().data_ptr() for tensor in session.loaded.model.parameters()}
    own |= {
        tensor.untyped_storage().data_ptr() for held in session.loaded.tensors_by_category().values() for tensor in held
    }
    return sum(size for pointer, size in storages.items() if pointer not in own)


def _tensors_in(thing: Any, seen: set[int]) -> list[torch.Tensor]:
    """Tensors that an update holds, also inside of its parts; not those of the base or its workspace."""
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing.detach()]
    if isinstance(thing, dict | list | tuple):
        parts = list(thing.values() if isinstance(thing, dict) else thing)
    else:
        ours = type(thing).__module__.startswith("edgepeft.engine.methods")
        parts = list(vars(thing).values()) if ours else []
    return [found for part in parts for found in _tensors_in(part, seen)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_the_header_tells_is_what_is_held(folder: Path, tmp_path: Path, config: Any, dtype: Any) -> None:
    loaded = load(folder, dtype)
    use = made(loaded, tmp_path / "a", config)
    session = Session(loaded)
    told = adapter_bytes(read_header(tmp_path / "a" / "adapter_model.safetensors"), dtype)
    with LiveBytes(CPU) as ledger:
        start = ledger.live_bytes
        session.activate([use])
        peak = ledger.peak_bytes - start
    assert told.held == held_by(session)
    looks_at_the_base = getattr(config, "dora", False) or getattr(config, "rank", None) == 2
    dense = 64 * 128 * 4
    assert peak <= told.reading + 4096 + (3 * dense if looks_at_the_base else 0)


def test_resident_adapters_leave_less_for_the_conversation(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    first, second = made(loaded, tmp_path / "a", LoraConfig(rank=4)), made(loaded, tmp_path / "b", LoraConfig(rank=8))
    sizes = [adapter_bytes(read_header(tmp_path / name / "adapter_model.safetensors"), "fp32") for name in "ab"]
    free = Session(loaded)
    budget = free.live_bytes + sizes[0].held + sizes[1].reading + 40 * free.cache_token_bytes
    session = Session(loaded, budget)
    before = session.token_limit()
    session.activate([first])
    assert session.token_limit() == (budget - session.live_bytes - sizes[0].held) // session.cache_token_bytes < before
    session.activate([first, second])
    both = sizes[0].held + sizes[1].held
    assert session.token_limit() == (budget - session.live_bytes - both) // session.cache_token_bytes
    # They stay when they are off, and so does what they take.
    session.activate([])
    assert session.token_limit() == (budget - session.live_bytes - both) // session.cache_token_bytes


def test_what_does_not_fit_is_refused_and_nothing_has_changed(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    small, large = made(loaded, tmp_path / "small", LoraConfig(rank=2)), made(loaded, tmp_path / "large", FullConfig())
    told = adapter_bytes(read_header(tmp_path / "large" / "adapter_model.safetensors"), "fp32")
    free = Session(loaded)
    session = Session(loaded, free.live_bytes + told.reading - 1)
    session.activate([small])
    expected = generate(session, PROMPT, [], GREEDY)
    active, limit, prefix = session.active, session.token_limit(), session.prefix
    message = r"with large .* are needed beside the base, and the memory budget leaves"
    with pytest.raises(DoesNotFit, match=message) as refused:
        session.activate([large])
    assert refused.value.exit_code == 4
    assert (session.active, session.token_limit(), session.prefix) == (active, limit, prefix)
    again = generate(session, [*PROMPT, *expected.ids, 50], [], GREEDY)
    assert again.reused_tokens > 0
    session.activate([small])
    session.prefix = None
    assert generate(session, PROMPT, [], GREEDY).ids == expected.ids


def test_unused_adapters_make_room(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    uses = [made(loaded, tmp_path / f"a{number}", LoraConfig(rank=8), seed=number) for number in range(4)]
    size = adapter_bytes(read_header(tmp_path / "a0" / "adapter_model.safetensors"), "fp32")
    free = Session(loaded)
    session = Session(loaded, free.live_bytes + size.held + size.reading + 8 * free.cache_token_bytes)
    answers = []
    for use in uses:
        session.activate([use])
        assert held_by(session) <= 2 * size.held
        answers.append(generate(session, PROMPT, [], GREEDY).ids)
    assert held_by(session) == 2 * size.held
    session.activate([uses[0]])
    assert generate(session, PROMPT, [], GREEDY).ids == answers[0]
    with pytest.raises(DoesNotFit):
        session.activate(uses)


def test_what_stands_first_counts_too(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    use = made(loaded, tmp_path / "a", PrefixConfig(20))
    told = adapter_bytes(read_header(tmp_path / "a" / "adapter_model.safetensors"), "fp32")
    free = Session(loaded)
    token = free.cache_token_bytes
    room = max(told.reading, told.held + 21 * token)
    Session(loaded, free.live_bytes + room).activate([use])
    set_active(loaded, [])
    detach(loaded, "adapter-1")
    with pytest.raises(DoesNotFit):
        Session(loaded, free.live_bytes + room - 1).activate([use])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_full_adapter_in_part_forms_its_head_once(tmp_path: Path, dtype: Any) -> None:
    loaded = load(write_tiny_model(tmp_path / "model", max_position_embeddings=8192), dtype)
    use = made(loaded, tmp_path / "a", FullConfig())
    free = Session(loaded)
    told = adapter_bytes(read_header(tmp_path / "a" / "adapter_model.safetensors"), dtype)
    table = loaded.shape.vocab * loaded.shape.hidden
    head = table * (4 if dtype == "fp32" else 2)
    budget = free.live_bytes + told.held + head + 20 * free.cache_token_bytes
    session = Session(loaded, max(budget, free.live_bytes + told.reading))
    session.activate([use])
    whole = session.token_limit()
    session.activate([AdapterUse(use.folder, 0.25)])
    assert whole - session.token_limit() == pytest.approx(head / free.cache_token_bytes, abs=1)
    hidden = torch.randn(1, loaded.shape.hidden).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode(), LiveBytes(CPU) as ledger:
        start = ledger.live_bytes
        session.logits(hidden)
        loaded.decoder(ids, use_cache=False)
        # Neither a table nor a matrix is formed for a token.
        assert ledger.peak_bytes - start < min(table, 64 * 128) * 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scale", [0.25, 1.5, -0.5])
def test_a_full_adapter_in_part_is_what_lies_between(folder: Path, tmp_path: Path, dtype: Any, scale: float) -> None:
    loaded = load(folder, dtype)
    use = made(loaded, tmp_path / "a", FullConfig())
    session = Session(loaded)
    session.activate([AdapterUse(use.folder, scale)])
    ids = torch.arange(10, 30)[None]
    with torch.inference_mode():
        found = loaded.model(ids, use_cache=False).logits.float()
        hidden = loaded.decoder(ids, use_cache=False).last_hidden_state[:, -1].contiguous()
        last = session.logits(hidden).float()
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.lerp_(tensors[f"base_model.model.{name}"], scale)
        expected = twin(ids).logits
    near = 1e-4 if dtype == "fp32" else 0.05
    assert float((found - expected).norm() / expected.norm()) < near
    assert float((last - expected[:, -1]).norm() / expected[:, -1].norm()) < near
