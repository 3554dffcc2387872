"""Conversations kept under the home folder."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from edgepeft.chat.archive import as_markdown, forget, list_kept, new_path
from edgepeft.chat.conversation import Conversation, read_stored

DAY = datetime(2026, 11, 25, 10, 0, 0)


def keep(question: str, *adapters: str, model: str = "tiny") -> Path:
    conversation = Conversation("Be brief.")
    conversation.ask(question)
    conversation.answer("Yes.", adapters)
    path = new_path(question, DAY)
    conversation.save(path, model)
    return path


def test_an_empty_home_has_none_and_makes_no_folder(edgepeft_home: Path) -> None:
    assert list_kept() == []
    assert not (edgepeft_home / "conversations").exists()


def test_names_are_safe_and_never_taken_twice() -> None:
    first, second = keep("../../etc: what?\nand"), keep("../../etc: what?\nand")
    assert first.name == "20261125-100000-etc-what-and.json"
    assert second.name == "20261125-100000-etc-what-and-2.json"


def test_the_newest_comes_first_and_damaged_files_are_passed_over() -> None:
    old, new = keep("old"), keep("a  new\none", "a@v1=0.5")
    os.utime(old, (1, 1))
    (new.parent / "broken.json").write_bytes(b"\xff{")
    listed = list_kept()
    assert [kept.path for kept in listed] == [new, old]
    assert (listed[0].title, listed[0].adapters, listed[0].questions) == ("a new one", ("a@v1=0.5",), 1)
    assert len(list_kept(1)) == 1
    forget(old)
    forget(old)
    assert [kept.path for kept in list_kept()] == [new]


def test_a_conversation_reads_as_markdown() -> None:
    text = as_markdown(read_stored(keep("Why?", "a@v1")))
    assert text == ("# Conversation with tiny\n\n## System\n\nBe brief.\n\n## You\n\nWhy?\n\n## a@v1\n\nYes.\n")
