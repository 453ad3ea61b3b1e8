"""The journal loses at most the stage that was under way, and serves one plan only."""

import json

import pytest

from compressor.verification.cascade import Found, Outcome
from compressor.verification.gallery_entry import GalleryEntry
from compressor.verification.journal import Journal, plan_id

PLAN = {"seed": 0, "threat": {"norm": "linf", "epsilon_pixels": 8 / 255}, "attacks": ["fgsm"]}


def outcome(chunk, stage="fgsm", *, margin=0.25):
    found = Found(
        place=4 * chunk,
        is_fooled=True,
        prediction=3,
        margin=margin,
        distance_pixels=0.1 + 0.2,
        fools_in_8_bits=False,
        num_forwards=7,
        num_backwards=2,
    )
    entry = GalleryEntry(
        group="closest",
        place=4 * chunk,
        attack=stage,
        adv_base64="AAEC",
        prediction=7,
        confidence_fraction=1 / 3,
        distance_pixels=0.1 + 0.2,
        margin=margin,
    )
    return Outcome(chunk=chunk, stage=stage, found=(found,), gallery=(entry,), duration_seconds=0.5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / ".verification.jsonl"


@pytest.fixture
def filled(path):
    """A journal of three stages, as bytes."""
    journal = Journal.open(path, PLAN)
    for one in (outcome(0, "clean"), outcome(0), outcome(1, "clean")):
        journal.add(one)
    return path.read_bytes()


def known(path, plan=PLAN):
    journal = Journal.open(path, plan)
    keys = [(chunk, stage) for chunk in range(3) for stage in ("clean", "fgsm")]
    return [key for key in keys if journal.get(*key) is not None]


def test_what_was_added_is_there_for_the_next_process(path, filled):
    journal = Journal.open(path, PLAN)
    assert journal.get(0, "fgsm") == outcome(0)
    assert journal.get(1, "clean") == outcome(1, "clean")
    assert journal.get(1, "fgsm") is None
    assert path.read_bytes() == filled


@pytest.mark.parametrize("margin", [-float("inf"), float("inf"), 1e-45, 0.1 + 0.2])
def test_numbers_come_back_as_they_were(path, margin):
    Journal.open(path, PLAN).add(outcome(0, margin=margin))
    assert Journal.open(path, PLAN).get(0, "fgsm") == outcome(0, margin=margin)


def test_every_cut_loses_at_most_the_line_it_is_in(path, filled):
    """Cut after any byte of the last two lines, and add to what is left."""
    ends = [place for place, byte in enumerate(filled) if byte == ord("\n")]
    for size in range(ends[1] + 1, len(filled) + 1, 29):
        path.write_bytes(filled[:size])
        num_whole = filled[:size].count(b"\n") - 1
        assert known(path) == [(0, "clean"), (0, "fgsm"), (1, "clean")][:num_whole]
        journal = Journal.open(path, PLAN)
        journal.add(outcome(2))
        assert known(path) == [(0, "clean"), (0, "fgsm"), (1, "clean")][:num_whole] + [(2, "fgsm")]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\n", b"\n\n", b"[]\n", b"no JSON\n"])
def test_a_damaged_beginning_begins_anew(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    assert known(path) == []
    assert path.read_text() == json.dumps(PLAN) + "\n"


WHOLE = outcome(1).to_json()
NO_OUTCOMES = {
    "fields": {"chunk": 0},
    "empty": {},
    "a list": [1],
    "nothing": None,
    "the plan": PLAN,
    "a field of an image": WHOLE | {"found": [{"place": 0}]},
    "a strange field": WHOLE | {"found": [WHOLE["found"][0] | {"margin": None}]},
    "no images": WHOLE | {"found": 3},
    "a strange image": WHOLE | {"found": [1]},
    "a strange picture": WHOLE | {"gallery": [{"group": "closest"}]},
    "a strange chunk": WHOLE | {"chunk": [0]},
    "a strange stage": WHOLE | {"stage": None},
    "no duration": {key: WHOLE[key] for key in WHOLE.keys() - {"duration_seconds"}},
}


@pytest.mark.parametrize("what", NO_OUTCOMES)
def test_what_follows_a_line_that_is_no_outcome_is_lost(path, filled, what):
    """It is JSON all the same; what was read before it stays, and goes on."""
    first, second, *rest = filled.splitlines(keepends=True)
    line = json.dumps(NO_OUTCOMES[what]).encode() + b"\n"
    path.write_bytes(b"".join([first, second, line, *rest]))
    journal = Journal.open(path, PLAN)
    assert path.read_bytes() == first + second
    journal.add(outcome(2))
    assert known(path) == [(0, "clean"), (2, "fgsm")]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"attacks": ["fgsm", "square"]}, {"threat": {"norm": "linf"}}, {"more": 1}],
    ids=str,
)
def test_another_plan_does_not_go_on(path, filled, change):
    assert known(path) == [(0, "clean"), (0, "fgsm"), (1, "clean")]
    assert known(path, PLAN | change) == []
    assert known(path) == []  # it is another's now


def test_plans_have_names_of_their_own():
    assert plan_id(PLAN) == plan_id(dict(reversed(PLAN.items())))
    others = [PLAN | {"seed": seed} for seed in range(1, 100)]
    assert len({plan_id(plan) for plan in [PLAN, *others]}) == 100


def test_opening_never_risks_what_is_there(path, filled, monkeypatch):
    """Opening writes the file again; a process may be killed at that moment too."""

    def fail(_):
        raise KeyboardInterrupt

    path.write_bytes(filled + b'{"chunk": 2')
    monkeypatch.setattr("compressor.device.kit_files.os.fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        Journal.open(path, PLAN)
    monkeypatch.undo()
    assert known(path) == [(0, "clean"), (0, "fgsm"), (1, "clean")]


def test_a_stage_is_on_the_disk_before_it_counts(path, monkeypatch):
    synced = []

    def sync(handle):
        synced.append(path.read_bytes().count(b"\n"))

    journal = Journal.open(path, PLAN)
    monkeypatch.setattr("compressor.verification.journal.os.fsync", sync)
    journal.add(outcome(0, "clean"))
    journal.add(outcome(0))
    assert synced == [2, 3]


def test_removing_leaves_nothing(path, filled):
    journal = Journal.open(path, PLAN)
    journal.remove()
    journal.remove()
    assert list(path.parent.iterdir()) == []


def test_in_memory_there_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal.in_memory()
    journal.add(outcome(0))
    assert journal.get(0, "fgsm") == outcome(0)
    journal.remove()
    assert list(tmp_path.iterdir()) == []
