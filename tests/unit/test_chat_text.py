"""Text of answers while they come, and conversations in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from edgepeft.chat.conversation import Conversation
from edgepeft.chat.detokenize import TextStream
from edgepeft.chat.protocol import Answer, Cancel, Generate, Reply, Request, Sampling
from edgepeft.errors import BadInput


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve – 漢字", "👩‍💻 emoji 🎉", "ends with é"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_pieces_are_whole_characters_and_join_to_the_text(text: str, step: int) -> None:
    data = text.encode()
    stream = TextStream(decode_bytes)
    pieces = [stream.push(list(data[start : start + step])) for start in range(0, len(data), step)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == text


def test_an_unfinished_character_is_told_at_the_end_only() -> None:
    stream = TextStream(decode_bytes)
    assert stream.push(list("é".encode()[:1])) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_a_model_that_means_the_replacement_character_is_not_held_back_for_ever() -> None:
    stream = TextStream(decode_bytes)
    pieces = [stream.push([255]) for _ in range(20)]
    assert "".join([*pieces, stream.finish()]) == "\ufffd" * 20
    assert any(pieces)


def test_text_that_depends_on_what_stands_before_it() -> None:
    """Sentencepiece drops the space of a first word."""
    words = ["▁Hello", "▁big", "▁world"]

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[index] for index in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(decode)
    assert [stream.push([index]) for index in range(3)] == ["Hello", " big", " world"]


def test_conversation_survives_its_file(tmp_path: Path) -> None:
    conversation = Conversation("Be brief.")
    conversation.ask("Why [b]?")
    conversation.answer("Because ☃.", ("triage@v1",))
    conversation.ask("And?")
    conversation.take_back()
    conversation.save(tmp_path / "talk.json", "tiny")
    again = Conversation.load(tmp_path / "talk.json")
    assert again.messages() == conversation.messages()
    assert again.turns[1].adapters == ("triage@v1",)
    again.reset()
    assert again.messages() == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"model": 1}'])
def test_what_is_no_conversation_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"talk\.json"):
        Conversation.load(path)
    with pytest.raises(BadInput, match="nothing"):
        Conversation.load(tmp_path / "nothing.json")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_protocol_lines_survive_their_codec() -> None:
    import msgspec

    request = Generate(id=4, prompt_ids=[1], stop_ids=[2], sampling=Sampling(seed=3))
    assert msgspec.json.decode(msgspec.json.encode(request), type=Request) == request
    assert msgspec.json.decode(b'{"type":"cancel","id":4}', type=Request) == Cancel(id=4)
    reply = Answer(
        id=4, ids=[], stopped_by="stop", prompt_tokens=1, prefill_seconds=0.1, tokens_per_second=2.0, index=3
    )
    assert msgspec.json.decode(msgspec.json.encode(reply), type=Reply) == reply
