"""Policies: what is refused and how it is said, and what the example means."""

import re
from pathlib import Path

import pytest

from compressor.gate.policy import GatePolicy, PolicyError, load_policy, with_baseline

EXAMPLE = Path(__file__).parents[2] / "examples" / "gate.toml"
RULE = "[clean]\nmin_accuracy = 0.25\n"
THREAT = '[threat]\nnorm = "linf"\nepsilon = "8/255"\n'


@pytest.fixture
def load(tmp_path):
    """Loads a policy from its text."""

    def load(text, *, head="schema = 1\n"):
        path = tmp_path / "policies" / "gate.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else (head + text).encode())
        return load_policy(path)

    return load


def test_example_is_well_formed():
    policy = load_policy(EXAMPLE)
    assert policy.worst_case.min_accuracy == 0.25
    assert policy.threat.epsilon == 8 / 255


def test_example_shows_every_table_and_key(load):
    commented = re.compile(r"^# (?=\[|\w+ = )", flags=re.MULTILINE)
    policy = load(commented.sub("", EXAMPLE.read_text()), head="")
    for name in GatePolicy.model_fields:
        table = getattr(policy, name)
        assert table not in (None, {}), name
        for key, value in getattr(table, "model_dump", dict)().items():
            assert value is not None, f"{name}.{key}"


def test_defaults(load):
    policy = load(RULE)
    assert (policy.confidence, policy.inconclusive) == (0.95, "inconclusive")
    assert policy.worst_case is None
    assert policy.baseline.report is None


@pytest.mark.parametrize("text", ['"1/4"', "0.25", '"0.25"'])
def test_limits_are_fractions_however_they_are_written(load, text):
    assert load(f"[clean]\nmin_accuracy = {text}\n").clean.min_accuracy == 0.25


def test_baseline_is_relative_to_the_policy_and_not_in_any_result(load, tmp_path):
    policy = load(THREAT + '[baseline]\nreport = "old/report.json"\nmax_drop = 0\n')
    assert policy.baseline.report == str(tmp_path / "policies" / "old" / "report.json")
    assert "old" not in policy.model_dump_json()
    other = with_baseline(policy, Path("new.json"))
    assert (other.baseline.report, other.baseline.max_drop) == ("new.json", 0)


REFUSED = {
    "no rule": ("", "there is no rule, so everything would pass"),
    "threat alone": ('[threat]\nnorm = "linf"\nepsilon = "8/255"\n', "there is no rule"),
    "budget alone": ("[budget]\nmax_samples = 5\n", "there is no rule"),
    "empty tables": ("[size]\n[per_class]\n[attacks]\n[baseline]\n", "there is no rule"),
    "unknown key": (
        "[worst_case]\nmin_acuracy = 0.2\nmin_accuracy = 0.2\n",
        "worst_case.min_acuracy: unknown key (got 0.2); did you mean min_accuracy?",
    ),
    "unknown table": (RULE + "[wurst]\nx = 1\n", "wurst: unknown key"),
    "above 1": ("[clean]\nmin_accuracy = 70\n", "clean.min_accuracy: must be less than 1 (got 70"),
    "one": ("[clean]\nmin_accuracy = 1\n", "below 1, which no sample can show"),
    "zero": ("[clean]\nmin_accuracy = 0\n", "above 0, or everything passes"),
    "negative": ("[attacks.x]\nmin_accuracy = -0.1\n", "attacks.x.min_accuracy: must be greater"),
    "class limit": ("[per_class]\nmin_worst_case_accuracy = 2\n", "min_worst_case_accuracy: must"),
    "words": ('[clean]\nmin_accuracy = "high"\n', "'high' is not a number"),
    "not a number": ("[clean]\nmin_accuracy = nan\n", "clean.min_accuracy: must be a finite"),
    "infinite": ("[clean]\nmin_accuracy = inf\n", "clean.min_accuracy: must be a finite"),
    "true": ("[clean]\nmin_accuracy = true\n", "True is not a number"),
    "missing": ("[clean]\n", "clean.min_accuracy: is missing"),
    "not a table": ("clean = 0.7\n", "clean: must be a table"),
    "luck": ("confidence = 0.5\n" + RULE, "below 0.8 luck passes"),
    "certainty": ("confidence = 1\n" + RULE, "confidence: must be less than 1 (got 1)"),
    "undecided": ('inconclusive = "pass"\n' + RULE, "inconclusive: must be 'fail', 'inconclusive'"),
    "grey levels": (
        RULE + '[threat]\nnorm = "linf"\nepsilon = 8\n',
        "threat.epsilon: 8 is more than a pixel can change (pixels are in [0, 1]); write eight "
        'grey levels as "8/255"',
    ),
    "norm": (RULE + '[threat]\nnorm = "l1"\nepsilon = 0.1\n', "threat.norm: must be 'linf' or"),
    "no epsilon": (RULE + '[threat]\nnorm = "l2"\n', "threat.epsilon: is missing"),
    "drop": ("[baseline]\nmax_drop = 1\n", "baseline.max_drop: must be less than 1 (got 1)"),
    "half a byte": ("[size]\nmax_bytes = 0.5\n", "size.max_bytes: must be a whole number"),
    "empty protocol": ('[worst_case]\nmin_accuracy = 0.2\nprotocol = ""\n', "must not be empty"),
    "nothing about classes": (RULE + "[per_class]\n", "[per_class] is empty, so it limits nothing"),
    "nothing about attacks": (RULE + "[attacks]\n", "[attacks] is empty"),
    "no budget": (RULE + "[budget]\n", "[budget] is empty"),
    "two empty tables": (RULE + "[size]\n[baseline]\n", "[size], [baseline] is empty"),
    "no images": (RULE + "[data]\n", "data.content_sha256: is missing"),
    "few digits": (
        RULE + '[data]\ncontent_sha256 = "abc"\n',
        "data.content_sha256: must be 12 to 64 of the digits 0 to 9 and a to f (got 'abc')",
    ),
    "two problems": (
        "confidence = 2\n[clean]\nmin_accuracy = 3\n",
        "confidence: must be less than 1 (got 2)",
    ),
}


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(load, text, says):
    with pytest.raises(PolicyError) as caught:
        load(text)
    message = str(caught.value)
    assert says in message
    assert "gate.toml is not a gate policy" in message
    assert "pydantic" not in message


UNDER_ATTACK = {
    "worst case": "[worst_case]\nmin_accuracy = 0.2\n",
    "classes": "[per_class]\nmin_worst_case_accuracy = 0.2\n",
    "drop": "[baseline]\nmax_drop = 0\n",
    "attacks": "[attacks.fgsm]\nmin_accuracy = 0.2\n",
}


@pytest.mark.parametrize("text", UNDER_ATTACK.values(), ids=UNDER_ATTACK)
def test_rules_about_attacks_need_a_threat(load, text):
    says = r'add \[threat\] with norm = "linf" and epsilon = "8/255"'
    with pytest.raises(PolicyError, match=says):
        load(text)
    assert load(text + THREAT).threat.norm == "linf"


@pytest.mark.parametrize("text", [RULE, "[per_class]\nmin_clean_accuracy = 0.2\n"])
def test_rules_without_attacks_need_no_threat_and_ask_for_no_protocol(load, text):
    policy = load(text)
    assert policy.threat is None
    assert not policy.judges_worst_case


@pytest.mark.parametrize(
    ("wanted", "protocol", "accepted"),
    [
        (None, "AutoAttack-style", True),
        (None, "AutoAttack (compat)", True),
        (None, "worst of fgsm", False),
        ("worst of", "worst of fgsm", True),
        ("worst of", "AutoAttack-style", True),
        ("worst of fgsm, pgd_sat", "worst of fgsm", False),
        ("worst of fgsm, pgd_sat", "AutoAttack (compat)", True),
        ("worst of", "no attack", False),
        ("AutoAttack (compat)", "AutoAttack-style", False),
    ],
)
def test_protocol_is_the_one_asked_for_or_autoattack(load, wanted, protocol, accepted):
    own = "" if wanted is None else f'[worst_case]\nmin_accuracy = 0.2\nprotocol = "{wanted}"\n'
    policy = load(UNDER_ATTACK["classes"] + THREAT + own)
    assert policy.accepts_protocol(protocol) == accepted


def test_images_are_named_by_their_hash_or_its_beginning(load):
    for digits in ("ab" * 32, "ab" * 6):
        rule = load(f'{RULE}[data]\ncontent_sha256 = "{digits}"\n').data
        assert rule.is_about("ab" * 32)
        assert not rule.is_about("ba" * 32)


def test_all_problems_are_named_at_once(load):
    with pytest.raises(PolicyError) as caught:
        load("confidence = 2\n[clean]\nmin_accuracy = 3\n")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"schema = 1\n[clean", "is not valid TOML"),
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
        (b"schema = " + b"1" * 5_000, "is not valid TOML"),
        (b"a = " + b"[" * 100_000, "is not valid TOML"),
    ],
)
def test_unreadable(load, content, says):
    with pytest.raises(PolicyError, match=says):
        load(content)


@pytest.mark.parametrize("head", ["", "schema = 2\n", 'schema = "1"\n'])
def test_another_schema(load, head):
    with pytest.raises(PolicyError, match="schema: "):
        load(RULE, head=head)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PolicyError, match=r"no\.toml does not exist; start from examples/gate"):
        load_policy(tmp_path / "no.toml")
    with pytest.raises(PolicyError, match="cannot be read: Is a directory"):
        load_policy(tmp_path)
