"""What counts as running out of memory, and which smaller layout comes next."""

from __future__ import annotations

from edgepeft.engine.training.recovery import is_out_of_memory, smaller_layout
from edgepeft.spec import Layout


def test_the_ladder_of_layouts() -> None:
    layout = Layout(micro_batch_tokens=4096, checkpointing="none", loss_chunk_tokens=256)
    found = smaller_layout(layout, 1000, 3)
    assert found is not None
    assert found[0].micro_batch_tokens == 500
    seen = []
    step = smaller_layout(layout, 900, 1)
    while step is not None:
        seen.append((step[0].checkpointing, step[0].loss_chunk_tokens))
        step = smaller_layout(step[0], 900, 1)
    assert seen == [("layer", 256), ("layer", 64), ("layer", 16)]
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
