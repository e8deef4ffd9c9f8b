"""A run in figures, in a line, and as a short table: what it kept, what that took, and why nothing was saved."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from . import cost
from .overlay import kept_of
from .profiles import Profile
from .trace import SHORTER, Run, Sampled


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Times are medians in seconds, None where no such step was timed; the first step pays for loading and is not."""

    anchors: int
    full: int
    shorter: int  # pruned or reused
    skipped: int  # by ToPi
    cached: int  # skipped by a cache
    full_seconds: float | None
    shorter_seconds: float | None
    measured: float | None
    predicted: float
    scoring_seconds: float
    scoring_share: float


def figures(run: Run) -> Figures:
    count = Counter(step.kind for step in run.steps)
    scoring: dict[int, float] = defaultdict(float)  # by step
    for anchor in run.anchors:
        scoring[anchor.step] += anchor.seconds
    timed, scored = run.steps[1:], sum(scoring.values())
    full = _median(step.seconds - scoring.get(step.index, 0.0) for step in timed if step.kind in ("full", "anchor"))
    short = _median(step.seconds for step in timed if step.kind in SHORTER)
    total = sum(step.seconds for step in run.steps)
    return Figures(
        anchors=count["anchor"],
        full=count["full"],
        shorter=sum(count[kind] for kind in SHORTER),
        skipped=(skipped := sum(step.extrapolated for step in run.steps)),
        cached=count["skipped"] - skipped,
        full_seconds=full,
        shorter_seconds=short,
        measured=_measured(run, scoring),
        predicted=cost.speedup(run),
        scoring_seconds=_median(scoring.values()) or 0.0,
        scoring_share=scored / total if total else 0.0,
    )


def _measured(run: Run, scoring: dict[int, float]) -> float | None:
    """The run's speed-up, by what an operation takes in full steps and in shorter ones: steps may be unequal."""
    timed, full, shorter = run.steps[1:], ("full", "anchor"), SHORTER
    of_full = _median((s.seconds - scoring.get(s.index, 0.0)) / s.full_flops for s in timed if s.kind in full)
    of_shorter = _median(s.seconds / s.flops for s in timed if s.kind in shorter)
    skipped = [s.seconds for s in run.steps if s.extrapolated]
    if not of_full or not (of_shorter or skipped):
        return None
    took = sum(s.full_flops * of_full if s.kind in full else s.flops * (of_shorter or 0.0) for s in run.steps)
    return sum(s.full_flops for s in run.steps) * of_full / (took + sum(skipped) + sum(scoring.values()))


def summary(run: Sampled) -> str:
    """One line for the log: what was kept, and what a full and a shorter step took."""
    if not isinstance(run, Run):
        return str(run)
    why, f = why_nothing(run), figures(run)
    skipped = f"; {f.skipped} of {len(run.steps)} steps were skipped" * bool(f.skipped) + _noise(run)
    if why:
        return f"nothing was {run.verb}: {why}{skipped}"
    shares = dict[int, list[float]]()
    for anchor in run.anchors:
        shares.setdefault(anchor.step, []).append(anchor.share)
    kept = ", ".join(f"{sum(each) / len(each):.0%}" for each in shares.values())
    text = f"kept {kept} of {run.reference_tokens} reference tokens at {f.anchors} anchor{'s'[: f.anchors > 1]}"
    if f.full_seconds and f.shorter_seconds:
        text += f"; a full step took {f.full_seconds:.3f} s, a {run.verb} one {f.shorter_seconds:.3f} s"
    if run.cache_bytes:
        text += f"; {run.cache_bytes / 1e6:.0f} MB of keys and values were kept"
    return text + skipped


def _noise(run: Run) -> str:
    return "; no step was skipped, as the sampler adds noise of its own" * run.noisy


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return median(values) if values else None


def why_nothing(run: Run) -> str | None:
    """Why a run pruned nothing, in one sentence; None where it pruned something."""
    s, steps, kinds = run.settings, len(run.steps), {step.kind for step in run.steps}
    if not steps:
        return "the sampler made no step that ToPi could take part in (the log says why)"
    if run.reference_tokens == 0:
        return "no reference reached the model: connect ReferenceLatent, or a node like it, to the conditioning"
    if run.no_room and kinds.isdisjoint(SHORTER):
        return "there was no room for the references' keys and values: use fewer or smaller ones, or the mode prune"
    if not run.anchors:
        if kinds == {"skipped"}:
            return "a cache skipped every step"
        if s.first_anchor(steps) >= steps:
            return f"too few steps: the first anchor is step {s.first_anchor(steps)}, and the run has {steps}"
        window = f"start_percent {s.anchors.start_percent:g} and end_percent {s.anchors.end_percent:g}"
        return f"outside the window: no step lies between {window}"
    if kinds.isdisjoint(SHORTER):
        if any(step.kind == "skipped" and not step.extrapolated for step in run.steps):
            return "a cache skipped every step but the anchors"
        if run.interval == 1 and not s.anchors.update_interval:
            if not any(step.extrapolated for step in run.steps):
                return f"steps are skipped instead, and within a tolerance of {s.tolerance:g} none could be"
            return "in a long run skipping steps brings more"
        if run.interval == 1 and steps > 1:
            return "update_interval is 1, so every step is an anchor and runs in full"
        return f"too few steps: of {steps}, none is left after the anchor"
    if s.mode == "prune" and all(anchor.share == 1 for anchor in run.anchors):
        if s.tau == 1:
            return "tau is 1, which keeps every token"
        if s.keep.min_keep == 1:
            return "min_keep is 1, which keeps every token"
        return f"no token could be spared for tau {s.tau:g}"
    return None


def text(run: Run) -> str:
    """The short table."""
    s, reuse = run.settings, run.settings.mode == "reuse"
    pruned = "" if reuse else f", pruned from {run.model.front_layers} on"
    lines = [f"{run.model.family}, {run.model.depth} layers: {_scored_in(run)}{pruned}"]
    how = "forecast, " * s.reuse.forecast if reuse else f"tau {s.tau:g}, "
    metric = "" if reuse and s.keeps_all else f", {s.keep.metric.name}"
    spacing = "computed steps" if s.tolerance else s.spacing
    every = f"update_interval {run.interval or s.update_interval} ({spacing})"
    lines.append(f"mode {s.mode}, {how}{every}, tolerance {s.tolerance:g}{metric}")
    if run.found_at is not None:
        lines.append("ToPi Calibrate and ToPi Save Profile find the layers on more images, and keep them.")
    why = why_nothing(run)
    if why:
        lines += ["", f"Nothing was {run.verb}: {why}."]
    if run.anchors:
        lines += ["", *_aligned(_anchor_rows(run))]
    if run.steps:
        f = figures(run)
        lines += ["", *_aligned(_step_rows(f, run.verb, saved=why is None or f.skipped > 0))]
    if run.noisy:
        lines += ["", "No step was skipped, as the sampler adds noise of its own: there is no line to go on."]
    if run.cache_bytes:
        took = f"The kept keys and values took {run.cache_bytes / 1e6:,.1f} MB, until the run's end"
        forecast = "; from the second anchor on they were forecast" * run.forecast
        where = "; some of it in host memory, as the GPU had no room, which is slower" * run.offloaded
        lines += ["", f"{took}{forecast}{where}."]
        if run.no_room:
            lines.append("For some of the prompts there was no room: these ran in full.")
    return "\n".join(lines)


def _scored_in(run: Run) -> str:
    layers = ", ".join(map(str, run.layers))
    if run.anchors and all(anchor.ranks is None for anchor in run.anchors):
        return "nothing was scored, as every token is kept and nothing looked on"
    if run.found_layers and run.found_at is None:
        return f"scored in {layers} (the middle one, as no profile fits and every token is kept)"
    if run.found_layers:
        return f"scored in {layers} (found at step {run.found_at}, as no profile fits)"
    if run.model.layers:
        return f"scored in {layers}" + f" (profile {run.model.profile})" * bool(run.model.profile)
    return "scored nowhere yet"


def _anchor_rows(run: Run) -> list[list[str]]:
    """One row per anchor; with a batch, the images' kept tokens in one cell."""
    most = max(len(anchor.layout.reference_grids) for anchor in run.anchors)
    names = ["reference kept"] if most == 1 else [f"reference {i} kept" for i in range(most)]
    rows = [["anchor", "sigma", *names] + ["all"] * (most > 1)]
    for anchor in run.anchors:
        count = len(anchor.layout.reference_grids)
        parts = [kept_of(anchor, i) for i in range(count)] + [anchor.kept] * (most > 1)
        counts = [", ".join(map(str, part.sum(1).tolist())) for part in parts]
        cells = [f"{n} of {part.shape[1]} ({part.float().mean():.1%})" for n, part in zip(counts, parts, strict=True)]
        cells[count:count] = [""] * (most - count)
        rows.append([f"step {anchor.step}", f"{anchor.sigma:.3f}", *cells])
    return rows


def _step_rows(f: Figures, word: str, saved: bool) -> list[list[str]]:
    counts = ((f.full, "full"), (f.skipped, "skipped"), (f.cached, "skipped by a cache"))
    rest = [f"{count} {kind}" for count, kind in counts if count]
    steps = ", ".join([f"{f.anchors} anchor{'s' * (f.anchors != 1)}", f"{f.shorter} {word}", *rest])
    full = f"{f.full_seconds:.3f} s" if f.full_seconds else "not timed: only the first, which pays for loading"
    rows = [["steps", steps], ["full step", full]]
    if f.shorter_seconds:
        rows.append([f"{word} step", f"{f.shorter_seconds:.3f} s"])
    if saved and f.measured and f.full_seconds:
        step = f", {f.full_seconds / f.shorter_seconds:.2f}x a {word} step" if f.shorter_seconds else ""
        rows.append(["speed-up", f"{f.measured:.2f}x the whole run{step}"])
    if saved:
        rows.append(["predicted", f"{f.predicted:.2f}x the whole run, by the count of operations"])
    if f.scoring_seconds:
        rows.append(["scoring", f"{1000 * f.scoring_seconds:.1f} ms an anchor, {f.scoring_share:.2%} of the run"])
    return rows


def headline(profile: Profile) -> str:
    """What a profile is of, in a line."""
    pairs = len(profile.calibration)
    model = f"{profile.family}, {profile.depth} layers of width {profile.hidden}"
    return f"{profile.name}: {model}, {pairs} image-prompt pair{'s'[: pairs != 1]}"


def describe(profile: Profile) -> str:
    """A profile's layers, and how much the pairs agree on them, as a short table."""
    calibration = profile.calibration
    mean, deviation = calibration.mean(), calibration.deviation()
    rows = [["layer", "S", "deviation", f"in a pair's own Top-{len(profile.layers)}"]]
    for layer, share in zip(profile.layers, calibration.agreement(profile.layers), strict=True):
        rows.append([str(layer), f"{mean[layer]:.3f}", f"{deviation[layer]:.3f}", f"{share:.0%}"])
    layers = ", ".join(map(str, profile.layers))
    first = f"representative layers {layers}; the first {profile.front_layers} see everything"
    return "\n".join([headline(profile), first, "", *_aligned(rows)])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
