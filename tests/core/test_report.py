"""What the report says of a run, and why nothing was pruned."""

import pytest
import torch

from topi_core.calibration import Calibration
from topi_core.config import AnchorSettings, KeepSettings, Model, Settings
from topi_core.layout import Layout
from topi_core.profiles import Profile
from topi_core.report import describe, figures, summary, text, why_nothing
from topi_core.trace import Anchor, Run, Step


def run(
    kinds, kept=(3, 1), references=((2, 2),), layers=(3,), profile="", mode="prune", anchors=None, tolerance=0.0, **keep
):
    """A run whose anchors keep these numbers of the 4 tokens, one per picture; the first step pays for loading.

    "extrapolated" steps are those that ToPi skips, "skipped" those of a cache.
    """
    layout = Layout(2, (2, 2), references)
    model = Model(family="flux1", depth=8, hidden=64, layers=layers, front_layers=2, profile=profile)
    chosen = Settings(
        mode=mode, tolerance=tolerance, anchors=AnchorSettings(**anchors or {}), keep=KeepSettings(**keep)
    )
    made = Run(model, chosen, reference_tokens=layout.reference_tokens)
    made.interval = chosen.interval(len(kinds)) if references else 0
    seconds = {"full": 2.0, "anchor": 2.1, "pruned": 1.0, "reused": 1.0, "skipped": 0.01}
    for i, kind in enumerate(kinds):
        if kind == "anchor":
            mask = torch.arange(layout.reference_tokens).expand(len(kept), -1) < torch.tensor(kept)[:, None]
            made.anchors.append(Anchor(i, 1 - i / 10, layout, (), mask, seconds=0.1, ranks=mask.byte()))
        flops = {"pruned": 500, "reused": 500, "skipped": 0, "extrapolated": 0}.get(kind, 1000)
        full, kind = 1000 * (kind != "skipped"), "skipped" if kind == "extrapolated" else kind
        took = seconds[kind] + 5 * (i == 0)
        made.steps.append(Step(i, 1 - i / 10, kind, layout.tokens, took, None, flops, full))
    return made


def test_figures():
    f = figures(run(["anchor", "pruned", "pruned", "anchor", "pruned"]))
    assert (f.anchors, f.shorter, f.full, f.skipped) == (2, 3, 0, 0)
    assert f.full_seconds == pytest.approx(2.0)  # without the scoring
    assert f.shorter_seconds == 1.0
    assert f.measured == pytest.approx(2 * 5 / (2 * 2.0 + 3 * 1.0 + 2 * 0.1))
    assert f.scoring_seconds == pytest.approx(0.1)
    assert f.scoring_share == pytest.approx(0.2 / (7.1 + 3 * 1.0 + 2.1))


def test_figures_of_skipped_steps():
    """ToPi's own count in what was saved; what a cache skipped does not."""
    f = figures(run(["anchor", "pruned", "anchor", "extrapolated", "skipped"]))
    assert (f.anchors, f.shorter, f.full, f.skipped, f.cached) == (2, 1, 0, 1, 1)
    assert f.measured == pytest.approx(2 * 4 / (2 * 2.0 + 1.0 + 0.01 + 2 * 0.1))
    assert f.predicted == pytest.approx(4000 / 2500)


def test_a_run_that_only_skipped_steps_has_a_speed_up():
    f = figures(made := run(["full", "full", "full", "extrapolated", "extrapolated", "full"], references=()))
    assert f.shorter_seconds is None
    assert f.measured == pytest.approx(2 * 6 / (2 * 4 + 0.02))
    said = text(made)
    assert "0 anchors, 0 pruned, 4 full, 2 skipped" in said and "skipped by a cache" not in said
    assert "Nothing was pruned: no reference reached the model" in said
    assert f"{f.measured:.2f}x the whole run" in said and "1.50x the whole run, by the count of operations" in said
    assert summary(made).endswith("; 2 of 6 steps were skipped")


def test_the_table_tells_skipped_steps_apart():
    said = text(run(["anchor", "pruned", "extrapolated", "skipped", "skipped"], tolerance=0.05))
    assert "1 anchor, 1 pruned, 1 skipped, 2 skipped by a cache" in said
    assert "update_interval 10 (computed steps), tolerance 0.05" in said


def test_a_sampler_that_adds_noise_is_named():
    made = run(["anchor", "pruned"], tolerance=0.05)
    made.noisy = True
    assert summary(made).endswith("; no step was skipped, as the sampler adds noise of its own")
    assert text(made).splitlines()[-1].startswith("No step was skipped, as the sampler adds noise of its own")


def test_the_measured_speed_up_holds_where_steps_are_unequal():
    """Twice the prompts in the first steps: by the medians of whole steps it would be far off."""
    made = run(["full", "anchor", "pruned", "pruned", "full", "pruned", "pruned"])
    for step in made.steps[:4]:
        step.seconds, step.flops, step.full_flops = 2 * step.seconds, 2 * step.flops, 2 * step.full_flops
    unequal, equal = figures(made).measured, figures(run(["full", "anchor", "pruned", "pruned"])).measured
    assert unequal == pytest.approx((4 * 4 + 3 * 2) / (2 * 4 + 2 * 2 + 1 * 2 + 2 * 1 + 0.1), rel=0.01)
    assert equal == pytest.approx(4 * 2 / (2 * 2 + 2 * 1 + 0.1))


def test_prompts_with_other_references_share_an_anchor():
    made = run(["full", "anchor", "pruned"], kept=(2,))
    (first,) = made.anchors
    made.anchors = [first, Anchor(1, 0.9, first.layout, (), torch.ones(1, 4, dtype=torch.bool))]
    assert summary(made).startswith("kept 75% of 4 reference tokens at 1 anchor;") and figures(made).anchors == 1


def test_the_first_step_is_not_timed():
    f = figures(run(["anchor", "pruned", "pruned"]))
    assert f.full_seconds is None and f.measured is None
    assert "not timed: only the first, which pays for loading" in text(run(["anchor", "pruned", "pruned"]))


def test_table():
    lines = text(run(["anchor", "pruned", "anchor", "pruned"], kept=(3,), references=((2, 2), (1, 2)))).splitlines()
    assert lines[0] == "flux1, 8 layers: scored in 3, pruned from 2 on"
    assert lines[1] == "mode prune, tau 0.85, update_interval 10 (steps), tolerance 0, influence"
    assert lines[3].split("  ")[0] == "anchor" and lines[3].endswith("all")
    assert [part.strip() for part in lines[4].split("  ") if part] == [
        "step 0", "1.000", "3 of 4 (75.0%)", "0 of 2 (0.0%)", "3 of 6 (50.0%)",
    ]  # fmt: skip
    assert "2 anchors, 2 pruned" in lines[7]
    assert any(line.startswith("speed-up") for line in lines)


def test_a_batch_is_counted_by_image():
    assert "3, 1 of 4 (50.0%)" in text(run(["anchor", "pruned"]))


@pytest.mark.parametrize(("made", "why"), [
    (run(["anchor", "pruned"]), None),
    (run([]), "the sampler made no step that ToPi could take part in (the log says why)"),
    (run(["full"] * 3, references=()), "no reference reached the model"),
    (run(["full"] * 4, anchors={"first_anchor": 6}), "the first anchor is step 6, and the run has 4"),
    (run(["full"] * 4, anchors={"start_percent": 0.99}), "no step lies between start_percent 0.99 and end_percent 1"),
    (run(["anchor"]), "too few steps: of 1, none is left"),
    (run(["anchor"] * 3, anchors={"update_interval": 1}), "every step is an anchor"),
    (run(["full"] * 3 + ["anchor"] * 9, mode="reuse", kept=(4,), tolerance=0.05), "a tolerance of 0.05 none could be"),
    (
        run(["full"] * 3 + ["anchor"] * 8 + ["extrapolated", "anchor"], mode="reuse", kept=(4,), tolerance=0.05),
        "skipping steps brings more",
    ),
    (run(["anchor", "pruned"], kept=(4,), tau=1.0), "tau is 1"),
    (run(["anchor", "pruned"], kept=(4,), min_keep=1.0), "min_keep is 1"),
    (run(["skipped"] * 2), "a cache skipped every step"),
    (run(["anchor", "skipped", "skipped"]), "a cache skipped every step but the anchors"),
])  # fmt: skip
def test_why_nothing_was_pruned(made, why):
    found = why_nothing(made)
    assert found is None if why is None else why in found
    assert (f"Nothing was {made.verb}" in text(made)) is (why is not None)


def test_the_report_says_where_the_layers_come_from():
    assert "scored in 3 (profile kontext), pruned from 2 on" in text(run(["anchor", "pruned"], profile="kontext"))
    made = run(["anchor", "pruned"], layers=())
    made.found_layers, made.found_at = (1, 5), 0
    said = text(made).splitlines()
    assert "scored in 1, 5 (found at step 0, as no profile fits), pruned from 2 on" in said[0]
    assert "ToPi Calibrate" in said[2]
    made.found_layers, made.found_at = (1,), None
    assert "scored in 1 (the middle one, as no profile fits and every token is kept)" in text(made)


def test_where_nothing_was_scored_the_report_says_so():
    made = run(["anchor", "reused"], mode="reuse", kept=(4,))
    made.anchors = [Anchor(0, 1.0, a.layout, (), a.kept) for a in made.anchors]
    lines = text(made).splitlines()
    assert lines[0] == "flux1, 8 layers: nothing was scored, as every token is kept and nothing looked on"
    assert lines[1] == "mode reuse, forecast, update_interval 2 (steps), tolerance 0"
    assert "scoring" not in "".join(lines[2:])


def test_log_and_report_tell_the_same_figures():
    """A full step is counted without the scoring in both."""
    made = run(["full", "anchor", "pruned", "anchor", "pruned"])
    f = figures(made)
    assert f"a full step took {f.full_seconds:.3f} s, a pruned one {f.shorter_seconds:.3f} s" in summary(made)
    assert f"{f.full_seconds:.3f} s" in text(made) and f.full_seconds == pytest.approx(2.0)


def test_the_log_line():
    assert summary(run(["anchor"])) == "nothing was pruned: too few steps: of 1, none is left after the anchor"
    assert summary(run(["anchor", "pruned", "anchor", "pruned"], kept=(1,))) == (
        "kept 25%, 25% of 4 reference tokens at 2 anchors; a full step took 2.000 s, a pruned one 1.000 s"
    )


def test_a_profile_in_words():
    rows = [(i, torch.tensor([0.1, 0.9, 0.5 + 0.2 * i]), 20) for i in range(2)]
    profile = Profile.calibrated(Calibration.of(3, rows), 2, name="mine", family="flux1", hidden=64, versions={})
    lines = describe(profile).splitlines()
    assert lines[0] == "mine: flux1, 3 layers of width 64, 2 image-prompt pairs"
    assert lines[1] == "representative layers 1, 2; the first 1 see everything"
    assert lines[4].split() == ["1", "0.900", "0.000", "100%"]
    assert lines[5].split() == ["2", "0.600", "0.141", "100%"]
