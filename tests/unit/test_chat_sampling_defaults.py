"""What generation_config.json advises, and what happens when it is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepeft.chat.protocol import Sampling
from edgepeft.chat.sampling_defaults import sampling_defaults


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"do_sample": true, "temperature": 0.2, "top_p": 0.9}', Sampling(temperature=0.2, top_p=0.9)),
        ('{"temperature": 0.6, "top_k": 20, "min_p": 0.05}', Sampling(temperature=0.6, top_k=20, min_p=0.05)),
        ('{"do_sample": false, "temperature": 0.6}', Sampling(temperature=0.0)),
        ('{"eos_token_id": 2}', Sampling()),
        ('{"temperature": -1, "top_p": 0.8}', Sampling(top_p=0.8)),
        ('{"temperature": null, "top_p": "high", "top_k": true}', Sampling()),
        ("[1]", Sampling()),
        ("{", Sampling()),
    ],
)
def test_advice_is_taken_where_it_makes_sense(text: str, expected: Sampling, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert sampling_defaults(tmp_path) == expected


def test_a_folder_without_advice_gets_our_defaults(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == Sampling()
