"""What can be combined, told by cards, configs and headers; and what is written beside a combination."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from adapter_files import make_card, write_lora, write_peft_folder
from edgepeft.chat.setup import choose_prompting, choose_setup, parse_adapter
from edgepeft.cli.app import app
from edgepeft.errors import BadInput, EdgepeftError
from edgepeft.library.audit import read_audit
from edgepeft.library.card import Card, Combination, CombinedPart, TemplateRecord
from edgepeft.library.combine_parts import averaged_parts, weighted_parts
from edgepeft.library.combined_card import adapter_config, combined_card, pattern_of
from edgepeft.library.combining import Combined, Plan, plan_combination
from edgepeft.library.lora_pairs import join_paths, read_lora_pairs
from edgepeft.library.parent import lineage
from edgepeft.library.peft_config import value_by_pattern
from edgepeft.library.store import open_adapter, publish, resolve_adapter
from edgepeft.models.headers import read_header
from edgepeft.models.store import ModelEntry, add_model

Q0, Q1, UP = (f"model.layers.{place}" for place in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.up_proj"))
SIZES = {Q0: (4, 24, 32), Q1: (4, 24, 32)}


@pytest.fixture
def ab(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of rank 4 in the library, a@v1 and b@v1, and their folders."""
    folders = write_lora(tmp_path / "a", SIZES, seed=1), write_lora(tmp_path / "b", SIZES, seed=2)
    for folder in folders:
        publish(folder, folder.name, make_card())
    return folders


def plan_of(*texts: str, how: str = "exact", **options: Any) -> Plan:
    parts, notes = weighted_parts(texts)
    return plan_combination("mix", parts, how, notes=notes, **options)


def made_card(plan: Plan, command: Any = "composed") -> Card:
    """The card for a plan, as if the engine had written the first part's tensors."""
    ranks = {path: sum(pair.rank for pair in pairs) for path, pairs in plan.modules().items()}
    made = Combined(ranks, 0.25, 0.3, Q0, None, None, "", {"torch": "2"})
    return combined_card(plan, command, made, read_header(plan.parts[0].adapter.weights))


def refused(*arguments: str) -> str:
    """The one line with which `edgepeft adapters ARGUMENTS` refuses."""
    with pytest.raises(EdgepeftError) as caught:
        CliRunner().invoke(app, ["adapters", *arguments], catch_exceptions=False)
    lines = caught.value.lines("", 200)
    assert len(lines) == 1
    return f"{int(caught.value.exit_code)} {lines[0]}"


def test_weights_are_read_with_their_references(ab: tuple[Path, Path]) -> None:
    parts, notes = weighted_parts(["a=0.7", "b@v1=-3e-1"])
    assert [(part.adapter.reference, part.weight) for part in parts] == [("a@v1", 0.7), ("b@v1", -0.3)]
    assert notes == []
    assert parts[0].sha256 != parts[1].sha256
    assert [part.weight for part in weighted_parts(["a", str(ab[1])])[0]] == [1.0, 1.0]


def test_an_equals_sign_may_be_part_of_a_path(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "run=3", SIZES)
    assert [part.weight for part in weighted_parts([str(folder)])[0]] == [1.0]
    assert [part.weight for part in weighted_parts([f"{folder}=0.5"])[0]] == [0.5]


def test_an_adapter_named_twice_has_its_weights_added_up(ab: tuple[Path, Path]) -> None:
    publish(ab[0], "a", make_card())
    parts, notes = weighted_parts(["a@v2=0.5", "b", "a=0.25"])
    assert [(part.adapter.reference, part.weight) for part in parts] == [("a@v2", 0.75), ("b@v1", 1.0)]
    assert notes == ["a@v2 is named twice: its weights add up to 0.75."]


def test_a_difference_is_said_to_be_one(ab: tuple[Path, Path]) -> None:
    assert "difference" in plan_of("a=0.5", "b=-0.5").notes[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "b=much"], "2 b=much: 'much' is not a weight"),
        (["a", "b="], "2 b=: '' is not a weight"),
        (["a", "b=nan"], "2 b=nan: a weight of nan is not possible"),
        (["a", "b=-inf"], "2 b=-inf: a weight of -inf is not possible"),
        (["a", "b=0"], "2 b@v1: has weight 0"),
        (["a=0.5", "b", "a@v1=-0.5"], "2 a@v1: has weight 0"),
        (["a"], "3 a@v1: only one adapter is named"),
        (["a=0.5", "a@v1=0.5"], "3 a@v1: only one adapter is named"),
        (["a", "c"], "3 adapter: no adapter is called 'c'"),
        (["a", "b@v7"], "no v7"),
        (["a", "b", "--how", "magic"], "2 --how: unknown kind 'magic'. Known: exact, svd, linear, ties, dare."),
        (["a", "b", "--how", "factors"], "2 --how: factors are averaged, not composed"),
        (["a", "b", "--rank", "4"], "2 --rank: exact does not cut the rank"),
        (["a", "b", "--how", "linear", "--rank", "4"], "2 --rank: linear does not cut the rank"),
        (["a", "b", "--how", "svd", "--rank", "0"], "2 --rank: a rank of 0"),
        (["a", "b", "--how", "svd", "--rank", "9"], "2 --rank: rank 9 is above 8, the rank of the exact sum"),
        (["a", "b", "--how", "ties", "--rank", "25"], "2 --rank: rank 25 is above 24, the smaller side"),
        (["a", "b", "--density", "0.5"], "2 --density: exact keeps every entry"),
        (["a", "b", "--how", "ties", "--density", "0"], "2 --density: a density of 0"),
        (["a", "b", "--how", "dare", "--density", "nan"], "2 --density: a density of nan"),
        (["a", "b", "--how", "dare", "--density", "1.5"], "2 --density: a density of 1.5"),
        (["a", "b", "--how", "ties", "--seed", "1"], "2 --seed: ties draws nothing"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    ab: tuple[Path, Path], edgepeft_home: Path, arguments: list[str], said: str
) -> None:
    assert said in refused("compose", *arguments, "--name", "mix")
    assert not (edgepeft_home / "adapters" / "mix").exists()


def test_a_name_must_be_one(ab: tuple[Path, Path]) -> None:
    assert refused("compose", "a", "b", "--name", "My Mix").startswith("2 --name:")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()} | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


A_KEY, B_KEY = (f"base_model.model.{Q1}.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"peft_type": "IA3"}, {}, "is of the type IA3"),
        ({"use_dora": True}, {}, "is of the type DoRA"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"bias": "all"}, {}, "biases"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "pissa_niter_4"),
        ({"r": None}, {}, "r and lora_alpha must be numbers"),
        ({"r": 4.5}, {}, "r and lora_alpha must be numbers"),
        ({"lora_alpha": "8"}, {}, "r and lora_alpha must be numbers"),
        ({"rank_pattern": {"(": 4}}, {}, "rank_pattern must give"),
        ({"r": 8}, {}, "is 4×24, and adapter_config.json says rank 8"),
        ({}, {A_KEY: None}, f"tensor {Q1}.lora_A.weight is missing"),
        ({}, {B_KEY: None}, f"tensor {Q1}.lora_B.weight is missing"),
        ({}, {B_KEY: np.ones((32, 3), np.float32)}, "is 32×3, and adapter_config.json says rank 4"),
        ({}, {B_KEY: np.ones(32, np.float32)}, "lora_B.weight is 32, and"),
        ({}, {A_KEY: np.ones((4, 24), np.int32)}, "is of I32, not of floats"),
        ({}, {"base_model.model.lm_head.weight": np.ones((2, 2), np.float32)}, "lm_head.weight belongs to no LoRA"),
        ({}, {A_KEY.replace(".weight", ".default.weight"): np.ones((4, 24), np.float32)}, "two tensors lora_A"),
        ({}, {B_KEY: np.ones((40, 4), np.float32)}, "maps 24 to 40 features, that of a@v1 24 to 32"),
    ],
)
def test_adapters_that_are_no_sound_lora_are_refused(
    ab: tuple[Path, Path], config: dict[str, Any], tensors: dict[str, Any], said: str
) -> None:
    change_config(ab[1], **config)
    change_tensors(ab[1], tensors)
    line = refused("compose", "a", str(ab[1]), "--name", "mix")
    assert said in line
    assert line.startswith("3 ")
    assert str(ab[1]) in line


def test_adapters_of_different_bases_are_refused(ab: tuple[Path, Path]) -> None:
    publish(ab[1], "other", make_card(base="big", base_fingerprint="sha256:" + "b" * 64))
    line = refused("compose", "a", "other", "--name", "mix")
    assert "3 other@v1: was trained on big (sha256:bbbbbbbbbbbb), and a@v1 on tiny (sha256:aaaaaaaaaaaa)" in line
    assert "exists and was trained on another base" in refused("compose", "a", "b", "--name", "other")


def test_a_name_without_a_card_is_known_by_its_sizes(ab: tuple[Path, Path], tmp_path: Path) -> None:
    from edgepeft.library.store import import_adapter

    import_adapter(write_lora(tmp_path / "wide", {Q0: (4, 48, 32)}), "wide")
    assert "its self_attn.q_proj has other sizes" in refused("compose", "a", "b", "--name", "wide")


def test_an_adapter_without_a_card_is_unverified(ab: tuple[Path, Path]) -> None:
    plan = plan_of("a", str(ab[1]))
    assert (plan.base, plan.base_fingerprint) == ("tiny", "sha256:" + "a" * 64)
    assert "unverified" in plan.notes[0]
    neither = plan_of(*map(str, ab))
    assert (neither.base, neither.base_fingerprint, len(neither.notes)) == ("tiny", "", 2)


def test_factors_need_equal_ranks_and_the_same_linears(ab: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_lora(tmp_path / "c", {Q0: (4, 24, 32), Q1: (3, 24, 32)}, rank_pattern={Q1: 3})
    assert f"{Q1} has 4 and 3" in refused("compose", "a", str(other), "--how", "linear", "--name", "mix")
    assert f"{Q1} has 4 and 3" in refused("average", "a", str(other), "--by", "equal", "--factors", "--name", "mix")
    fewer = write_lora(tmp_path / "d", {Q0: (4, 24, 32)})
    plan_of("a", str(fewer), how="linear")
    assert f"1 of 2 change {Q1}" in refused("average", "a", str(fewer), "--by", "equal", "--factors", "--name", "mix")


def test_scales_follow_patterns_and_rank_stabilisation(tmp_path: Path) -> None:
    sizes = {Q0: (4, 24, 32), Q1: (9, 24, 32), UP: (4, 24, 40)}
    changes = {"rank_pattern": {"1.self_attn.q_proj": 9}, "alpha_pattern": {"up_proj": 6}, "use_rslora": True}
    pairs = read_lora_pairs(open_adapter(write_lora(tmp_path / "a", sizes, **changes)))
    assert {path: pair.scale for path, pair in pairs.items()} == {Q0: 4.0, Q1: 8 / 3, UP: 3.0}
    assert (pairs[Q1].rank, pairs[UP].in_features, pairs[UP].out_features) == (9, 24, 40)
    many = {f"model.layers.{layer}.mlp.up_proj": (4, 24, 32) for layer in (10, 2, 0)}
    assert [path.split(".")[2] for path in read_lora_pairs(open_adapter(write_lora(tmp_path / "b", many)))] == [
        "0",
        "2",
        "10",
    ]


def test_one_module_may_be_spelled_in_two_ways() -> None:
    text, both = "model.layers.0.q", "model.language_model.layers.0.q"
    assert join_paths([[text], [both]]) == [{text: text}, {both: text}]
    assert join_paths([[text, "model.layers.1.q"], [text]])[1] == {text: text}
    # Two towers: neither may be taken for the other.
    vision = "model.vision.layers.0.q"
    assert join_paths([[both], [vision, both]]) == [{both: both}, {vision: vision, both: both}]


def test_ranks_are_written_as_peft_reads_them() -> None:
    ranks = {
        f"model.layers.{n}.{x}": 24 if x == "self_attn.q_proj" else 8
        for n in (1, 11)
        for x in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert pattern_of(ranks, 8) == {"self_attn.q_proj": 24}
    uneven = ranks | {"model.layers.1.mlp.up_proj": 12}
    towers = ranks | {"vision.layers.1.cross.self_attn.q_proj": 8}
    for wanted in (uneven, towers):
        pattern = pattern_of(wanted, 8)
        assert {path: value_by_pattern(pattern, path, 8) for path in wanted} == wanted


def test_the_config_is_plain_lora_of_scale_one(ab: tuple[Path, Path], tmp_path: Path) -> None:
    config = adapter_config(plan_of("a", "b"), {Q0: 8, Q1: 8})
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
    assert (config["use_rslora"], config["base_model_name_or_path"]) == (False, "tiny")
    assert config["target_modules"] == [Q0, Q1]
    endings = write_lora(tmp_path / "c", {UP: (2, 24, 40)}, target_modules=["up_proj"])
    config = adapter_config(plan_of("a", str(endings)), {Q0: 4, Q1: 4, UP: 2})
    assert config["target_modules"] == [Q0, Q1, "up_proj"]
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {"mlp.up_proj": 2}, {"mlp.up_proj": 2})
    for changes in ({"target_modules": ".*up_proj"}, {"layers_to_transform": [0], "target_modules": ["up_proj"]}):
        change_config(endings, **changes)
        assert adapter_config(plan_of("a", str(endings)), {Q0: 4, Q1: 4, UP: 2})["target_modules"] == [UP, Q0, Q1]


def test_samples_come_from_cards_or_the_command_line(ab: tuple[Path, Path]) -> None:
    publish(ab[0], "a", make_card(metrics={"train_samples": 300.0}))
    parts = averaged_parts(["a", "b:100"], "samples")
    assert [(part.weight, part.samples) for part in parts] == [(0.75, 300), (0.25, 100)]
    assert [part.weight for part in averaged_parts(["a:700", "b:100"], "samples")] == [0.875, 0.125]
    parts = averaged_parts(["a", "b", str(ab[1])], "equal")
    assert [(part.weight, part.samples) for part in parts] == [(1 / 3, None)] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["a", "b"],
            "3 a@v1: has a card without its number of training samples. Write it as a:1200, or use --by equal",
        ),
        (["a:5", "FOLDER"], "has no card"),
        (["a:0", "b:5"], "2 a:0: '0' is not a number of samples"),
        (["a:-5", "b:5"], "'-5' is not a number of samples"),
        (["a:1.5", "b:5"], "'1.5' is not a number of samples"),
        (["a:", "b:5"], "'' is not a number of samples"),
        (["a:5", "b:5", "--by", "equal"], "2 --by: 'a:5' has a number of samples"),
        (["a:5", "b:5", "--by", "size"], "2 --by: unknown weighting 'size'"),
        (["a:5", "b:5", "a@v1:5"], "2 a@v1: is named twice"),
        (["a:5"], "3 a@v1: only one adapter is named"),
        (["a:5", "b:5", "--factors", "--rank", "2"], "2 --rank: averaged factors keep the rank"),
        (["a:5", "b:5", "--rank", "9"], "2 --rank: rank 9 is above 8"),
    ],
)
def test_averages_that_cannot_be_meant_are_one_line(ab: tuple[Path, Path], arguments: list[str], said: str) -> None:
    texts = [str(ab[1]) if text == "FOLDER" else text for text in arguments]
    assert said in refused("average", *texts, "--name", "mix")


def test_the_card_tells_the_parts(ab: tuple[Path, Path]) -> None:
    card = made_card(plan_of("a=0.7", "b=-0.3", how="dare", seed=3))
    assert card.combined is not None
    assert card.combined.formula == "0.7 × a@v1 + -0.3 × b@v1, dare"
    assert (card.combined.rank, card.combined.density, card.combined.seed) == (4, 0.5, 3)
    assert [part.sha256 for part in card.combined.parts] == [part.sha256 for part in weighted_parts(["a", "b"])[0]]
    assert (card.recipe, card.layout, card.run, card.steps) == (None, None, "", 0)
    assert (card.precision, card.compute_dtype, card.base) == ("nf4", "bf16", "tiny")
    assert card.template == TemplateRecord("{{ messages }}", "sha256:t", (258,))
    # 256 parameters were 1 % of the model with them.
    assert card.trainable_share == pytest.approx(448 / (25600 - 256 + 448))
    assert card.notes == ()
    assert msgspec.json.decode(msgspec.json.encode(card), type=Card) == card


def test_an_average_can_be_averaged_again(ab: tuple[Path, Path]) -> None:
    plan = plan_combination("mix", averaged_parts(["a:300", "b:100"], "samples"), "exact")
    publish(ab[0], "mix", made_card(plan, "averaged"))
    assert [part.samples for part in averaged_parts(["mix", "b:50"], "samples")] == [400, 50]
    equal = plan_combination("mix", averaged_parts(["a", "b"], "equal"), "exact")
    assert made_card(equal, "averaged").metrics == {}


def test_what_the_parts_do_not_share_is_noted(ab: tuple[Path, Path]) -> None:
    other = TemplateRecord("[{{ messages }}]", "sha256:u", (258,))
    publish(ab[1], "b", make_card(precision="bf16", system="Be brief.", template=other))
    card = made_card(plan_of("a", "b"))
    assert (card.precision, card.system, card.template) == (None, None, None)
    assert [word in " ".join(card.notes) for word in ("bf16 and in nf4", "system", "templates")] == [True] * 3
    stops = TemplateRecord("{{ messages }}", "sha256:t", (259,))
    publish(ab[1], "b", make_card(template=stops))
    assert made_card(plan_of("a", "b")).template is None
    publish(ab[1], "b", make_card(template=None))
    assert made_card(plan_of("a", "b")).template is None


def dated(day: str, text: str) -> Card:
    card = make_card(template=TemplateRecord(text, f"sha256:{text}", (258,)))
    assert card.recipe is not None
    recipe = msgspec.structs.replace(card.recipe, data=msgspec.structs.replace(card.recipe.data, day=day))
    return msgspec.structs.replace(card, recipe=recipe)


def test_templates_that_differ_in_their_day_are_one(ab: tuple[Path, Path]) -> None:
    publish(ab[0], "a", dated("2026-11-09", "Today is 09 Nov 2026. {{ m }}"))
    publish(ab[1], "b", dated("2026-12-01", "Today is 01 Dec 2026. {{ m }}"))
    card = made_card(plan_of("b", "a"))
    assert card.template is not None
    assert (card.template.text, card.template_day) == ("Today is 01 Dec 2026. {{ m }}", "2026-12-01")
    assert "date" in card.notes[0]
    publish(ab[1], "b", dated("2026-12-01", "Today is 02 Dec 2026. {{ m }}"))
    assert made_card(plan_of("b", "a")).template is None


def test_cards_from_before_combinations_are_read(ab: tuple[Path, Path], edgepeft_home: Path) -> None:
    path = edgepeft_home / "adapters" / "a" / "v1" / "card.json"
    old = json.loads(path.read_text())
    del old["combined"]
    path.write_text(json.dumps(old))
    card = resolve_adapter("a").card
    assert card is not None
    assert (card.combined, card.precision, card.recipe is None) == (None, "nf4", False)
    assert card.template_day == card.created[:10]


def test_a_combination_is_published_with_its_formula(ab: tuple[Path, Path]) -> None:
    publish(ab[0], "mix", made_card(plan_of("a=0.7", "b=0.3")))
    (entry,) = read_audit("mix")
    assert (entry.action, entry.detail) == ("composed", "0.7 × a@v1 + 0.3 × b@v1, exact")
    child = make_card(parent="mix@v1")
    assert lineage(child) == ["mix@v1", "0.7 × a@v1 + 0.3 × b@v1, exact"]


def test_show_and_list_tell_a_combination(ab: tuple[Path, Path]) -> None:
    publish(ab[0], "mix", made_card(plan_of("a=0.7", "b=0.3", how="svd")))
    shown = CliRunner().invoke(app, ["adapters", "show", "mix"], catch_exceptions=False).stdout
    digest = weighted_parts(["b"])[0][0].sha256
    for text in ("composed from 2 adapters", f"0.3 × b@v1, {digest}", "25 % of its norm", "composed v1 (0.7 × a@v1"):
        assert "".join(text.split()) in "".join(shown.split())
    listed = CliRunner().invoke(app, ["adapters", "list"], catch_exceptions=False).stdout
    assert "mix@v1" in listed
    as_json = CliRunner().invoke(app, ["adapters", "show", "mix", "--json"], catch_exceptions=False).stdout
    assert json.loads(as_json)["card"]["combined"]["parts"][1]["adapter"] == "b@v1"
    listed = CliRunner().invoke(app, ["adapters", "list", "--json"], catch_exceptions=False).stdout
    assert [adapter["combined"] is None for adapter in json.loads(listed)["adapters"]] == [True, True, False]


def combination(**changes: Any) -> Combination:
    parts = (CombinedPart("a@v1", "sha256:1", 0.7), CombinedPart("b@v1", "sha256:2", 0.3))
    return msgspec.structs.replace(Combination("composed", "exact", parts), **changes)


def test_a_chat_with_a_combination_starts_as_its_parts_were_trained(tiny_model: Path, tmp_path: Path) -> None:
    entry: ModelEntry = add_model(tiny_model, "tiny")
    folder = write_peft_folder(tmp_path / "mix", entry.shape)

    def chat_with(name: str, **changes: Any) -> Any:
        fields = {"base_fingerprint": entry.fingerprint, "template": None} | changes
        card = msgspec.structs.replace(make_card(**fields), recipe=None, layout=None, run="", steps=0)
        publish(folder, name, card)
        return choose_setup(None, [parse_adapter(name)], gpu="cpu")

    setup = chat_with("known", combined=combination(precision="nf4", system="Be brief."))
    assert (setup.entry.name, setup.precision, setup.warnings) == ("tiny", "nf4", ())
    assert choose_prompting(entry, [parse_adapter("known")]).system == "Be brief."
    assert chat_with("mixed", combined=combination()).precision == "bf16"
    unknown = chat_with("unknown", combined=combination(), base_fingerprint="", base="")
    assert unknown.entry.name == "tiny"
    assert "unverified" in unknown.warnings[0]


def test_a_template_with_a_date_is_compared_on_its_own_day(tmp_path: Path) -> None:
    from tiny import write_tiny_model

    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    entry = add_model(write_tiny_model(tmp_path / "dated", template=template), "dated")
    folder = write_peft_folder(tmp_path / "mix", entry.shape)
    frozen = TemplateRecord(template.replace("strftime_now('%d %b %Y')", '"09 Nov 2026"'), "sha256:d", (258,))
    for day, warned in (("2026-11-09", False), ("2026-11-10", True)):
        card = make_card(base_fingerprint=entry.fingerprint, template=frozen)
        combined = combination(template_day=day)
        publish(folder, "mix", msgspec.structs.replace(card, recipe=None, layout=None, combined=combined))
        assert bool(choose_prompting(entry, [parse_adapter("mix")]).warnings) is warned


def test_parts_of_layers_do_not_make_an_adapter_another_bases(tiny_model: Path, tmp_path: Path) -> None:
    from edgepeft.library.store import check_base

    entry = add_model(tiny_model, "tiny")
    one = write_lora(tmp_path / "one", {"model.layers.1.self_attn.o_proj": (2, 64, 64)})
    assert "unverified" in check_base(open_adapter(one), entry)[0]
    change_config(one, target_modules=["o_proj"])
    with pytest.raises(BadInput, match="in 1 layers, and this base has 2"):
        check_base(open_adapter(one), entry)


def test_a_combination_without_agreement_says_nothing_of_training() -> None:
    card = msgspec.structs.replace(make_card(), recipe=None, layout=None, combined=combination())
    assert (card.precision, card.compute_dtype, card.system, card.template_day) == (None, None, None, "")
