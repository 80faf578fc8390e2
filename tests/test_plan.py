"""The plan's grammar: presets, groups, round trips, and errors that name the value."""

import re

import pytest

from mst_jax.plan import PRESETS, RESIDUALS, LayerGroup, Plan, parse_plan, read_groups


def group(layers, save="", offload="", every=1):
    return LayerGroup(
        layers=layers,
        save=frozenset(save.split()),
        offload=frozenset(offload.split()),
        every=every,
    )


OF_4_LAYERS = {
    "full": group(4, "input"),
    "save_attention": group(4, "input attention"),
    "none": group(4, " ".join(RESIDUALS)),
    "offload": group(4, "", "input"),
    "offload_attention": group(4, "", "input attention"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    want = OF_4_LAYERS[name]
    assert parse_plan(name, 4) == Plan(groups=(want,))
    assert parse_plan(f" {PRESETS[name]} ", 4) == Plan(groups=(want,))


@pytest.mark.parametrize(
    "text, want",
    [
        (
            "8 offload=input; 24 save=input+attention",
            [group(8, "", "input"), group(24, "input attention")],
        ),
        ("* offload=input every=2", [group(32, "", "input", 2)]),
        ("* save=input every=32", [group(32, "input", every=32)]),
        (
            "1 save=input; * offload=input+qkv save=attention;1 save=input+gate_up",
            [
                group(1, "input"),
                group(30, "attention", "input qkv"),
                group(1, "input gate_up"),
            ],
        ),
        (
            " 16 every=4 save=attention offload=input ;  16 save=mlp_input+input ",
            [group(16, "attention", "input", 4), group(16, "input mlp_input")],
        ),
    ],
)
def test_groups(text, want):
    plan = parse_plan(text, 32)
    assert list(plan.groups) == want
    assert plan.groups[0].kept == want[0].save | want[0].offload


@pytest.mark.parametrize(
    "text",
    [
        *PRESETS,
        "8 offload=input; 24 save=input+attention",
        "1 save=input; * offload=input+qkv save=attention; 1 save=input+gate_up",
        "16 every=4 save=attention offload=input; 16 save=mlp_input+input",
    ],
)
def test_text_form_is_read_back(text):
    plan = parse_plan(text, 32, head_groups=4)
    assert parse_plan(str(plan), 32, head_groups=4) == plan
    assert "*" not in str(plan)  # a saved plan says how many


def test_text_form():
    text = "16 every=4  save=attention offload=input;*  save=gate_up+mlp_input+input"
    assert str(parse_plan(text, 20)) == (
        "16 save=attention offload=input every=4; 4 save=input+mlp_input+gate_up"
    )
    assert str(read_groups("* save=input")[0]) == "* save=input"


def test_offloads():
    assert parse_plan("1 save=input; 1 offload=input", 2).offloads
    assert not parse_plan("none", 2).offloads


def test_description():
    ahead, saved = (
        parse_plan(text, 2, prefetch=True).describe() for text in ("offload", "full")
    )
    assert ahead.startswith("2 offload=input (") and "fetched a layer ahead" in ahead
    assert "ahead" not in saved


@pytest.mark.parametrize(
    "text, message",
    [
        ("ful", "plan group 'ful' must start with a number of layers or '*'"),
        ("ful", "or name one of ('full', 'save_attention', 'none', 'offload', "),
        ("", "plan group '' must start with"),
        ("full; none", "plan group 'full' must start with"),  # a preset is whole
        ("* save=input;", "plan group '' must start with"),
        ("0 save=input", "plan group '0 save=input' must start with"),
        ("-1 save=input", "must start with a number of layers or '*'"),
        ("1.5 save=input", "must start with a number of layers or '*'"),
        ("* keep=input", "'keep=input' is not save=..., offload=... or every=..."),
        ("* input", "'input' is not save=..., offload=... or every=..., once each"),
        ("* save=", "'save=' is not save=..., offload=..."),
        ("* save=input save=qkv", "'save=qkv' is not save=..., offload=... or every"),
        ("* save=input every=0", "every='0' must be a positive number"),
        ("* save=input every=two", "every='two' must be a positive number"),
        ("* save=input+atention", "['atention'] not in ('input', 'qkv', 'attention',"),
        ("* save=input offload=kv", "['kv'] not in ('input',"),
        ("* save=input+ offload=qkv", "[''] not in ('input',"),
        ("* save=input+qkv offload=qkv", "['qkv'] both saved and offloaded"),
        ("* save=attention", "'input' must be saved or offloaded"),
        ("*", "plan group '*': 'input' must be saved or offloaded"),
        (
            "* save=input offload=attention every=2",
            "with every=2 only 'input' can be offloaded",
        ),
    ],
)
def test_what_is_no_plan(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_groups(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_plan(text, 4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("3 save=input", "plan='3 save=input' does not add up to 4 layers"),
        ("5 save=input", "does not add up to 4 layers"),
        ("2 save=input; 1 offload=input", "does not add up to 4 layers"),
        ("4 save=input; * offload=input", "does not add up to 4 layers"),  # none left
        ("5 save=input; * offload=input", "does not add up to 4 layers"),
        (
            "* save=input; * offload=input",
            "does not add up to 4 layers; one group may have '*' layers, for the rest",
        ),
        ("* save=input every=3", "every=3 does not divide the group's 4 layers; split"),
        (
            "1 save=input; * save=input every=2",
            "every=2 does not divide the group's 3 layers",
        ),
    ],
)
def test_plans_of_another_model(text, message):
    read_groups(text)  # a plan, but not one of these 4 layers
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_plan(text, 4)
