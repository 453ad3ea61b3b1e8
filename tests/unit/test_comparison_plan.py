"""From a comparison file, or a recipe and names, to the recipes of all runs."""

from pathlib import Path

import pytest

from compressor.comparison.plan import make_plan
from compressor.comparison.request import Wishes, read_request, with_wishes
from compressor.errors import RecipeError, UsageError

BASE = """
name = "base"
seed = 7
[data]
source = "digits"
validation_size = 100
[student]
architecture = "tiny"
[method]
name = "bmtard"
loss_scale = 1.0
[method.attack]
num_steps = 7
[training]
epochs = 3
"""
TEACHERS = """
[[teachers]]
role = "robust"
source = "tiny:first.pt"
[[teachers]]
role = "clean"
source = "tiny:clean.pt"
[[teachers]]
role = "robust"
source = "tiny:second.pt"
"""
FILE = """
seeds = 3
reference = "mild"
[base]
recipe = "base.toml"
set = ["training.epochs=2"]
[verification]
samples = 50
[[methods]]
name = "trades"
[[methods]]
name = "trades"
label = "mild"
seeds = 2
settings = { beta = 1.0, attack = { num_steps = 5 } }
[[methods]]
name = "bmtard"
label = "other"
teachers = ["clean", 2]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base.toml").write_text(BASE + TEACHERS)
    (tmp_path / "file.toml").write_text(FILE)
    return tmp_path


def plan_of(path, names=None, *, overrides=(), **wishes):
    request = with_wishes(read_request(path, names=names), Wishes(**wishes))
    return make_plan(request, overrides=overrides)


def sources(method):
    return [table.source for table in method.recipe.teachers]


def test_names_of_methods_replace_the_table_of_the_base(folder):
    plan = plan_of(folder / "base.toml", "bmtard, trades,cross_entropy", seeds=2)
    assert [method.label for method in plan.methods] == ["bmtard", "trades", "cross_entropy"]
    assert plan.reference == "bmtard"
    bmtard, trades, plain = plan.methods
    assert bmtard.recipe.method.loss_scale == 1.0
    assert bmtard.origin == "as in the base recipe"
    assert trades.recipe.method.beta == 6.0
    assert trades.attack.num_steps == 7
    assert "attack.num_steps of the base recipe" in trades.origin
    assert plain.attack is None
    shared = [m.recipe.model_dump(exclude={"name", "method", "teachers"}) for m in plan.methods]
    assert shared[0] == shared[1] == shared[2]


def test_first_seeds_come_before_second_ones(folder):
    plan = plan_of(folder / "base.toml", "trades,pgd_at", seeds=2)
    names = ["trades-seed7", "pgd_at-seed7", "trades-seed8", "pgd_at-seed8"]
    assert [run.name for run in plan.runs] == names
    assert [run.recipe.seed for run in plan.runs] == [7, 7, 8, 8]


def test_a_method_takes_the_first_teachers_that_it_needs(folder):
    """PGD-AT none, ARD the first robust one."""
    plan = plan_of(folder / "base.toml", "pgd_at,ard")
    none, one = plan.methods
    assert sources(none) == []
    assert none.teachers == "none (3 of the base left out)"
    assert sources(one) == ["tiny:first.pt"]
    assert one.teachers == "robust first.pt (2 of the base left out)"


@pytest.mark.parametrize(("name", "taken"), [("distillation", "clean.pt"), ("ard", "first.pt")])
def test_of_two_roles_a_method_takes_those_who_know_its_images(name, taken, folder):
    """Plain distillation attacks nothing, so it is of the clean teacher where there is one."""
    (method,) = plan_of(folder / "base.toml", name).methods
    assert sources(method) == [f"tiny:{taken}"]
    text = (folder / "base.toml").read_text().replace('"clean"', '"robust"')
    (folder / "base.toml").write_text(text)
    (method,) = plan_of(folder / "base.toml", name).methods
    assert sources(method) == ["tiny:first.pt"]


def test_the_scale_of_the_loss_is_shared(folder):
    """Or the base's own method alone would learn at the rate that the base was made for."""
    plan = plan_of(folder / "base.toml", "bmtard,rslad,distillation,trades")
    assert [getattr(m.recipe.method, "loss_scale", None) for m in plan.methods] == [1, 1, 1, None]
    assert plan.methods[1].origin.startswith("defaults, loss_scale and attack.num_steps of the ba")
    assert not any("loss_scale" in note for note in plan.notes)
    own = "[[methods]]\nname='rslad'\n[[methods]]\nname='ard'\nsettings={loss_scale=0.2}"
    (folder / "own.toml").write_text(f"[base]\nrecipe='base.toml'\n{own}")
    plan = plan_of(folder / "own.toml", overrides=["method.loss_scale=3"])
    assert [m.recipe.method.loss_scale for m in plan.methods] == [3, 0.2]
    (note,) = [note for note in plan.notes if "loss_scale" in note]
    assert note.startswith("loss_scale differs (rslad: 3; ard: 0.2)")


def test_scales_that_nobody_states_are_named_where_they_differ(folder):
    (folder / "base.toml").write_text(BASE.replace("loss_scale = 1.0\n", "") + TEACHERS)
    plan = plan_of(folder / "base.toml", "bmtard,mtard,iad,trades")
    assert [m.recipe.method.loss_scale for m in plan.methods[:3]] == [0.1, 0.1, 1.0]
    (note,) = [note for note in plan.notes if "loss_scale" in note]
    assert note.startswith("loss_scale differs (bmtard, mtard: 0.1; iad: 1)")


def test_a_comparison_file(folder):
    plan = plan_of(folder / "file.toml")
    trades, mild, other = plan.methods
    assert plan.reference == "mild"
    assert [len(method.recipes) for method in plan.methods] == [3, 2, 3]
    assert trades.recipe.training.epochs == 2
    assert (mild.recipe.method.beta, mild.attack.num_steps) == (1.0, 5)
    assert mild.origin.endswith("set here: beta=1, attack.num_steps=5")
    assert sources(other) == ["tiny:clean.pt", "tiny:second.pt"]
    assert other.recipe.method.loss_scale == 1.0
    assert plan.verification.samples == 50
    assert plan.verification.cascade_samples == 300
    assert any("budget" in note for note in plan.notes)
    assert any("different numbers of seeds" in note for note in plan.notes)


def test_the_command_line_goes_before_the_file(folder):
    wishes = {"seeds": 1, "reference": "trades", "samples": 9}
    plan = plan_of(folder / "file.toml", "mild,trades", overrides=["data.image_size=9"], **wishes)
    assert [method.label for method in plan.methods] == ["mild", "trades"]
    assert plan.reference == "trades"
    assert plan.verification.samples == 9
    assert {method.recipe.data.image_size for method in plan.methods} == {9}
    assert any("One seed" in note for note in plan.notes)


def test_every_method_that_does_not_fit_is_named(folder):
    (folder / "base.toml").write_text(BASE)
    with pytest.raises(RecipeError, match="nothing was run") as caught:
        plan_of(folder / "base.toml", "bmtard,trades,ard,nonsense")
    message = str(caught.value)
    assert "bmtard: 1 problem in the recipe" in message or "bmtard: 2 problem" in message
    assert "ard: 1 problem" in message
    assert "takes 1 robust teacher, the recipe has 0" in message
    assert "there is no method 'nonsense'; use" in message
    assert "trades:" not in message


BAD = {
    "no such key": ("[base]\nrecipe='base.toml'\nx=1\n[[methods]]\nname='trades'", "base.x: unkn"),
    "no methods": ("[base]\nrecipe='base.toml'", "methods: is missing"),
    "no method at all": (
        "methods=[]\n[base]\nrecipe='base.toml'",
        "methods: must have at least one table",
    ),
    "no base": ("[[methods]]\nname='trades'", "base: is missing"),
    "twice": ("[base]\nrecipe='base.toml'\n" + 2 * "[[methods]]\nname='trades'\n", "two methods"),
    "a label with a slash": (
        "[base]\nrecipe='base.toml'\n[[methods]]\nname='trades'\nlabel='../x'",
        "methods.0.label: must be of letters",
    ),
    "an unknown setting": (
        "[base]\nrecipe='base.toml'\n[[methods]]\nname='trades'\nsettings={gamma=1}",
        "method.gamma: unknown key",
    ),
    "a teacher too far": (
        "[base]\nrecipe='base.toml'\n[[methods]]\nname='ard'\nteachers=[3]",
        "names place 3, counted from 0; the base recipe has 3 teachers",
    ),
    "a teacher too many": (
        "[base]\nrecipe='base.toml'\n[[methods]]\nname='ard'\nteachers=['clean', 'clean']",
        "has 1 clean teachers, fewer than",
    ),
    "a teacher twice": (
        "[base]\nrecipe='base.toml'\n[[methods]]\nname='ard'\nteachers=['robust', 0]",
        "names a teacher twice",
    ),
    "a role that does not fit": (
        "[base]\nrecipe='base.toml'\n[[methods]]\nname='ard'\nteachers=['clean']",
        "takes 1 robust teacher, the recipe has 0",
    ),
    "a base that is not there": (
        "[base]\nrecipe='other.toml'\n[[methods]]\nname='trades'",
        "other.toml does not exist",
    ),
    "no image": (
        "[base]\nrecipe='base.toml'\n[verification]\nsamples=-1\n[[methods]]\nname='trades'",
        "verification.samples: must be greater than or equal to 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_explained(case, folder):
    text, expected = BAD[case]
    (folder / "bad.toml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        plan_of(folder / "bad.toml")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        ("teachers = 3", "not a list of [[teachers]] tables"),
        ("[[teachers]]\nsource = 'tiny:a.pt'", "teachers.0.role is None; use clean or robust"),
    ],
)
def test_bad_teachers_are_explained(teachers, expected, folder):
    place = (teachers + BASE) if teachers.startswith("teachers") else BASE + teachers
    (folder / "base.toml").write_text(place)
    with pytest.raises(RecipeError) as caught:
        plan_of(folder / "base.toml", "trades")
    assert expected in str(caught.value)


def test_the_same_step_written_in_two_ways_is_one_budget(folder):
    """A quarter of epsilon by default, and as a number."""
    rows = "[[methods]]\nname='trades'\n[[methods]]\nname='pgd_at'\nsettings={{attack={{{}}}}}"
    for size, expected in (("2/255", []), ("3/255", ["trades: 7 steps of 2/255; pgd_at: 7 st"])):
        text = rows.format(f"step_size_pixels='{size}'")
        (folder / "steps.toml").write_text(f"[base]\nrecipe='base.toml'\n{text}")
        said = [note for note in plan_of(folder / "steps.toml").notes if "budget" in note]
        assert len(said) == len(expected)
        assert all(part in note for part, note in zip(expected, said, strict=True))


def test_trainings_that_differ_are_named(folder):
    text = """
[base]
recipe = "base.toml"
[[methods]]
name = "trades"
label = "long"
training = { schedule = { kind = "one_cycle" }, ema_decay = 0.9 }
[[methods]]
name = "trades"
label = "short"
training = { epochs = 1 }
"""
    (folder / "unequal.toml").write_text(text)
    plan = plan_of(folder / "unequal.toml")
    long, short = (method.recipe.training for method in plan.methods)
    assert (long.epochs, long.schedule.kind, long.ema_decay) == (3, "one_cycle", 0.9)
    assert (short.epochs, short.schedule.kind, short.ema_decay) == (1, "milestones", None)
    assert plan.methods[0].origin.endswith("; of training: schedule.kind=one_cycle, ema_decay=0.9")
    (note,) = (note for note in plan.notes if "alike" in note)
    assert "(long: epochs=3, schedule.kind=one_cycle, schedule.warmup_fraction=0.3, " in note
    assert "ema_decay=0.9; short: epochs=1, schedule.kind=milestones, schedule.mil" in note
    assert note.endswith("ema_decay=none); compare their costs too.")
    assert "batch_size" not in note
    assert not any("alike" in note for note in plan_of(folder / "base.toml", "trades").notes)
    request = read_request(folder / "unequal.toml", names=None)
    with pytest.raises(
        UsageError, match=r"training\.epochs does not reach short, .*change it there"
    ):
        make_plan(request, overrides=["training.epochs=9"])
    assert make_plan(request, overrides=["training.batch_size=64"])


def test_attacks_that_change_along_the_run_are_named(folder):
    rows = ("first_num_steps = 2", "begins_at = 0.3", "first_num_steps = 7")
    entries = "".join(
        f"""[[methods]]\nname = "trades"\nlabel = "{label}"\nsettings.attack = {{ {row} }}\n"""
        for label, row in zip("abc", rows, strict=True)
    )
    (folder / "growing.toml").write_text(f"""[base]\nrecipe = "base.toml"\n{entries}""")
    (note,) = [note for note in plan_of(folder / "growing.toml").notes if "budget" in note]
    assert "a: 7 steps of 2/255, growing from 2 until 0.8 of the run; b: 7 steps of" in note
    assert "b: 7 steps of 2/255, none before 0.3 of it; c: 7 steps of 2/255)" in note


def test_a_schedule_of_another_kind_takes_the_place_of_the_one_below(folder):
    schedule = "\n[training.schedule]\nkind = 'one_cycle'\nwarmup_fraction = 0.2\n"
    base = (folder / "base.toml").read_text().replace("epochs = 3\n", "epochs = 3\n" + schedule)
    (folder / "base.toml").write_text(base)
    rows = "[[methods]]\nname='trades'\ntraining={{schedule={{{}}}}}"
    found = []
    for given in ("kind='milestones', decay=0.5", "initial_factor=0.1"):
        text = f"[base]\nrecipe='base.toml'\n{rows.format(given)}"
        (folder / "schedules.toml").write_text(text)
        found.append(plan_of(folder / "schedules.toml").methods[0].recipe.training.schedule)
    assert (found[0].kind, found[0].decay) == ("milestones", 0.5)
    assert (found[1].kind, found[1].warmup_fraction, found[1].initial_factor) == (
        "one_cycle",
        0.2,
        0.1,
    )


LOST = ["method.loss_scale=2.0", "method.attack.start='zero'", "method={name='bmtard'}"]


@pytest.mark.parametrize("override", LOST)
def test_what_no_method_would_read_is_refused(override, folder):
    key = override.partition("=")[0]
    with pytest.raises(UsageError, match=f"--set {key} changes bmtard, which is not compared"):
        plan_of(folder / "base.toml", "trades", overrides=[override])
    (folder / "lost.toml").write_text(
        f'[base]\nrecipe="base.toml"\nset=["{override}"]\n[[methods]]\nname="trades"'
    )
    with pytest.raises(UsageError, match=f"--set {key} changes bmtard"):
        plan_of(folder / "lost.toml")
    plan_of(folder / "base.toml", "trades,bmtard", overrides=[override])
    if key == "method.loss_scale":
        plan_of(folder / "base.toml", "trades,rslad", overrides=[override])
        (folder / "lost.toml").write_text(
            '[base]\nrecipe="base.toml"\n[[methods]]\nname="rslad"\nsettings={loss_scale=1}'
        )
        with pytest.raises(UsageError, match=r"--set method\.loss_scale changes bmtard"):
            plan_of(folder / "lost.toml", overrides=[override])
    budget = plan_of(folder / "base.toml", "trades", overrides=["method.attack.num_steps=9"])
    assert budget.methods[0].attack.num_steps == 9


def test_the_method_of_the_base_must_be_right_though_it_is_not_compared(folder):
    (folder / "base.toml").write_text(BASE.replace("loss_scale", "loss_scall"))
    with pytest.raises(
        RecipeError, match="method.loss_scall: unknown key .* did you mean loss_scale"
    ):
        plan_of(folder / "base.toml", "trades")


def test_long_values_are_cut(folder):
    (folder / "long.toml").write_text(f"[base]\nrecipe='base.toml'\nmethods='{'x' * 200}'")
    with pytest.raises(RecipeError) as caught:
        plan_of(folder / "long.toml")
    assert max(map(len, str(caught.value).splitlines())) < 120


def test_bad_wishes_are_refused(folder):
    with pytest.raises(UsageError, match="--methods bmtard,trades"):
        plan_of(folder / "base.toml")
    with pytest.raises(UsageError, match="names no method"):
        plan_of(folder / "base.toml", " , ")
    with pytest.raises(UsageError, match="no such label; it has trades, mild, other"):
        plan_of(folder / "file.toml", "bmtard")
    with pytest.raises(UsageError, match="no method 'x' to refer to; use trades"):
        plan_of(folder / "base.toml", "trades", reference="x")


COMPARISONS = sorted((Path(__file__).parents[2] / "examples" / "comparisons").glob("*.toml"))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_example_comparisons_can_be_planned(path):
    assert make_plan(read_request(path, names=None)).methods


def test_the_darht_example_pairs_teachers_that_differ_with_teachers_alike():
    (path,) = [path for path in COMPARISONS if path.stem == "cifar10-darht"]
    plan = make_plan(read_request(path, names=None))
    assert plan.reference == "darht-alike"
    mixed, alike = (
        next(method for method in plan.methods if method.label == label)
        for label in ("darht-mixed", "darht-alike")
    )
    assert [recipe.seed for recipe in mixed.recipes] == [recipe.seed for recipe in alike.recipes]
    assert mixed.recipe.method == alike.recipe.method


def test_ciard_retrains_its_teacher_by_rates_of_the_authors_sum():
    """Of 1,580 steps and of 117,300: a cosine from a sixth of the run on."""
    (path,) = [path for path in COMPARISONS if path.stem == "cifar10-methods"]
    methods = {
        method.label: method.recipe for method in make_plan(read_request(path, names=None)).methods
    }
    recipe = methods["ciard"]
    assert recipe.training.batch_size == 128
    num_steps = recipe.training.epochs * -(-recipe.data.training_size // 128)
    assert num_steps == 1_580
    ours = recipe.method.teacher_learning_rate * num_steps
    assert ours == pytest.approx(1e-4 * 117_300, rel=0.01)
    assert recipe.method.teacher_from_fraction == 50 / 300
