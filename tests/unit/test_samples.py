"""The table of samples: the first attack that fools an image has broken it."""

import pytest

from compressor.verification.cascade import Found, Outcome
from compressor.verification.samples import Sample, take_outcomes, to_table, write_csv


def found(place=0, **changes):
    values = {
        "place": place,
        "is_fooled": False,
        "prediction": 1,
        "margin": -1.0,
        "distance_pixels": 0.03,
        "fools_in_8_bits": False,
        "num_forwards": 10,
        "num_backwards": 4,
    }
    return Found(**(values | changes))


def outcome(stage, *rows):
    return Outcome(chunk=0, stage=stage, found=rows, gallery=(), duration_seconds=1.0)


@pytest.fixture
def samples():
    """One that is wrong clean, one broken by the second attack, one that stands."""
    samples = [Sample(index=70, label=1), Sample(index=8, label=2), Sample(index=9, label=3)]
    fooled = {"is_fooled": True, "fools_in_8_bits": True}
    take_outcomes(
        samples,
        [
            outcome(
                "clean",
                found(0, prediction=5, margin=0.5, distance_pixels=0.0, **fooled),
                found(1, margin=-2.0),
                found(2, margin=-3.0),
            ),
            outcome("fgsm", found(1, margin=-0.5), found(2, margin=-4.0)),
            outcome(
                "apgd_t",
                found(1, prediction=7, margin=0.125, distance_pixels=0.02, **fooled),
                found(2, margin=-0.75),
            ),
            outcome(
                "square", found(1, is_fooled=True, prediction=6, margin=9.0), found(2, margin=-1.0)
            ),
        ],
    )
    return samples


def test_the_first_that_fools_has_broken_it(samples):
    assert [sample.broken_by for sample in samples] == ["clean", "apgd_t", None]
    assert [sample.prediction for sample in samples] == [5, 7, None]
    assert [sample.fools_in_8_bits for sample in samples] == [True, True, False]


def test_what_comes_after_changes_nothing_but_the_costs(samples):
    _, broken, _ = samples
    assert (broken.margin, broken.distance_pixels) == (0.125, 0.02)
    assert broken.fooled_by == {"clean": False, "fgsm": False, "apgd_t": True, "square": True}
    assert (broken.num_forwards, broken.num_backwards) == (40, 16)


def test_margin_of_what_stands_is_the_largest_that_was_reached(samples):
    assert samples[2].margin == -0.75
    assert samples[2].clean_margin == -3.0
    assert samples[2].distance_pixels is None


def test_an_image_that_is_wrong_clean_has_no_distance(samples):
    assert samples[0].distance_pixels is None
    assert samples[0].margin == samples[0].clean_margin == 0.5


@pytest.mark.parametrize(("margin", "is_near"), [(-2.0, False), (-0.51, False), (-0.49, True)])
def test_an_image_is_near_when_little_of_its_margin_is_left(margin, is_near):
    sample = Sample(index=0, label=0)
    sample.take("clean", found(margin=-2.0))
    sample.take("fgsm", found(margin=margin))
    assert sample.is_near(0.25) == is_near


def test_table_has_the_order_of_the_samples(samples):
    table = to_table(samples)
    assert table.index == (70, 8, 9)
    assert table.label == (1, 2, 3)
    assert table.broken_by == ("clean", "apgd_t", None)
    assert table.prediction == (5, 7, None)


def test_csv_has_a_line_per_image_and_a_column_per_attack(samples, tmp_path):
    path = tmp_path / "deep" / "samples.csv"
    write_csv(path, samples, ["fgsm", "apgd_t", "square"])
    assert path.read_text() == (
        "index,label,broken_by,prediction,margin,distance_pixels,fools_in_8_bits,num_forwards,"
        "num_backwards,fgsm,apgd_t,square\n"
        "70,1,clean,5,0.5,,yes,10,4,,,\n"
        "8,2,apgd_t,7,0.125,0.02,yes,40,16,stands,fooled,fooled\n"
        "9,3,,,-0.75,,no,40,16,stands,stands,stands\n"
    )
