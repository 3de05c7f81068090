"""What a report shows: one entry a figure, in the order of the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from matplotlib.figure import Figure

from evolute.reports import figures, items, spectra, views
from evolute.reports.run import NOT_LAYERS, Run


@dataclass(frozen=True)
class Section:
    """One figure and what a reader must know about it.

    Attributes:
        key: anchor on the page and file name of the exported figure.
        title: heading.
        draw: figure function.
        good: the sentences under the figure: what it shows and what a good value looks like.
        needs: patterns of metric names; one with a finite value is enough to draw the figure.
        remedy: what to add to a run that records none of them.
        optional: leave the section out, rather than explain, where no run has data.
    """

    key: str
    title: str
    draw: Callable[[Sequence[Run]], Figure]
    good: str
    needs: tuple[str, ...]
    remedy: str = ""
    optional: bool = False

    def found(self, runs: Sequence[Run]) -> bool:
        """Say whether some run recorded what the figure needs."""
        names = {name for run in runs for name in run.metrics if run.has(name)}
        return any(
            fnmatchcase(name, need) and not (need.endswith("/*") and name.rsplit("/", 1)[-1] in NOT_LAYERS)
            for name in names
            for need in self.needs
        )

    def reason(self) -> str:
        """Return the sentence that stands in place of a figure without data."""
        return f"No figure: {' and '.join(self.needs)} not recorded. {self.remedy}"


SECTIONS = (
    Section(
        "loss",
        "Loss",
        figures.loss,
        "Good: both losses fall and flatten together. A validation curve that turns up while training falls is "
        "overfitting. In reinforcement learning the loss says nothing: look at the reward.",
        ("train/loss", "val/loss"),
        "The recipe's module logs these; log train/loss from training_step in your own.",
    ),
    Section(
        "bits-per-byte",
        "Bits per byte",
        figures.bits_per_byte,
        "Good: ends well below the dashed line, the bits per byte of a bigram model of the same corpus. A curve that "
        "stays at the floor has learnt letter pairs and no more.",
        ("val/bits_per_byte",),
        optional=True,
    ),
    Section(
        "reward",
        "Reward",
        figures.reward,
        "Good: rises and holds, on held-out problems as well. A reward that falls to nothing within a few steps is a "
        "collapse: the rate is too high, or single completions pull too hard. Reward that rises while the share "
        "solved does not is a reward function being gamed.",
        ("reward",),
        optional=True,
    ),
    Section(
        "ranking",
        "Ranking",
        items.ranking,
        "Share of validation cases whose right item is among the first ten of all items, and the same with higher "
        "places counting more. Good: rising and then flat; falling while the loss falls is overfitting. Compare only "
        "runs with the same split, tie rule and treatment of seen items.",
        ("val/ndcg@*",),
        optional=True,
    ),
    Section(
        "item-geometry",
        "Geometry of the item vectors",
        items.geometry,
        "Good: a norm ratio near 1 (a few long items otherwise take the softmax), a mean cosine near 0 (a shared "
        "direction removes curvature from all others), and a condition number of the loss in the query that stays "
        "low: where it is thousands, the directions that tell similar items apart are the ones learned last.",
        ("item_geometry/mean_cos",),
        optional=True,
    ),
    Section(
        "item-map",
        "Map of the items",
        items.item_map,
        "Item vectors on their two directions of largest variance, at the first and the last measurement, coloured by "
        "genre where the data knows it. Text vectors begin in clusters of genre; what training makes of them follows "
        "what people take together.",
        ("item_geometry/kept",),
        optional=True,
    ),
    Section(
        "item-neighbours",
        "Neighbours of well-known items",
        items.neighbours,
        "The nearest three by cosine of the most frequent item of each of six genres, before and after training. "
        "Good: from similar words to what the same people take.",
        ("item_geometry/kept",),
        optional=True,
    ),
    Section(
        "views",
        "Held-out views",
        views.views,
        "Good: renders that differ from the truth at edges only. A floater is a bright spot of error with a patch of "
        "depth error around it; a whole wall of depth error is a surface that colour alone does not place. Red lies "
        "too near, blue too far; white is right, or unknown.",
        ("val/psnr",),
        optional=True,
    ),
    Section(
        "quality",
        "Quality of held-out views",
        views.quality,
        "Good: PSNR rises and depth error falls until the end. PSNR that falls while training improves is overfitting "
        "to the training views; a number of Gaussians that is flat has reached its budget.",
        ("val/psnr",),
        optional=True,
    ),
    Section(
        "schedule",
        "Learning-rate schedule",
        figures.schedule,
        "The rate the scheduler asks for. Good: a short rise, then a fall to a small fraction of the peak by the last "
        "step; a run that stops high on this curve was stopped early.",
        ("lr", "lr-*", "lr/*"),
        "Add Lightning's LearningRateMonitor().",
        optional=True,
    ),
    Section(
        "layer-lr",
        "Learning rate used by each layer",
        figures.layer_lr,
        "Rows are layers, colour is the rate each was really stepped with: schedule times the layer's own factor. "
        "Good: columns brighten and darken together with the schedule, rows differ by a small, steady factor; a row "
        "that flickers follows its noise estimate rather than the noise.",
        ("layer_lr/*",),
        "Add NoiseAdaptiveLR() to the callbacks; dry_run=True records it and changes nothing.",
    ),
    Section(
        "noise",
        "Gradient noise by layer",
        figures.noise,
        "Running estimate of each layer's gradient noise, in the dual norm its optimizer steps by; compare rows "
        "within one kind of layer only (hidden matrices, embedding and head, vectors). Good: rows settle after warm- "
        "up. Rows that differ by several times within a kind are what a per-layer rate can use; equal rows leave it "
        "nothing to gain.",
        ("noise/*",),
        "Add NoiseAdaptiveLR() to the callbacks; dry_run=True records it and changes nothing.",
    ),
    Section(
        "lr-ratio",
        "Learning-rate factor by layer",
        figures.lr_ratio,
        "What noise makes of the schedule: 1 leaves a layer its full rate, and the quietest layer of each kind has "
        "exactly 1. Good: between about 0.3 and 1 and slow to change. All at 1 is the plain optimizer; many rows near "
        "0 mean most of the model hardly trains.",
        ("lr_ratio/*",),
        "Add NoiseAdaptiveLR() to the callbacks; dry_run=True records it and changes nothing.",
    ),
    Section(
        "sharpness",
        "Sharpness against its threshold",
        figures.sharpness,
        "The largest eigenvalue of the Hessian, and the curvature above which a step of this optimizer at this "
        "learning rate overshoots. Good: a ratio that climbs towards 1 and hovers there, the edge of stability, or "
        "stays below. Well above 1 for many steps, the loss should be spiking: lower the rate or lengthen the warm- "
        "up. Far below 1 throughout, a higher rate may be free.",
        ("curvature/sharpness",),
        "Add CurvatureMonitor() to the callbacks.",
    ),
    Section(
        "trace",
        "Trace of the Hessian",
        figures.trace,
        "Sum of all curvatures; the band is one standard error of the estimate. Good: a slow drift with a band narrow "
        "beside it. A band as wide as the value says only that more probes are needed.",
        ("curvature/trace",),
        optional=True,
    ),
    Section(
        "directional",
        "Curvature along the update",
        figures.directional,
        "Second derivative of the loss along the last update, scaled to length one. Good: positive and well below the "
        "sharpness; near it, steps run along the steepest wall of the valley.",
        ("curvature/directional",),
        optional=True,
    ),
    Section(
        "block-sharpness",
        "Sharpness by block",
        figures.block_sharpness,
        "Largest eigenvalue of each block of the Hessian on its diagonal: layers, or what the run asked for. Good: no "
        "single row orders of magnitude above all others; such a block sets the learning rate for the whole model.",
        ("curvature/block_sharpness/*",),
        optional=True,
    ),
    Section(
        "block-trace",
        "Trace by block",
        figures.block_trace,
        "Sum of the curvatures of each block. Good: rows that drift slowly; grey cells are estimates below zero.",
        ("curvature/block_trace/*",),
        optional=True,
    ),
    Section(
        "critical",
        "Critical sharpness of the updates",
        spectra.critical,
        "Two over the learning rate at which the update just taken would have begun to raise the loss, found by "
        "forward passes along it; and the rate used over that one. Good: a ratio below 1, near it when training is at "
        "its edge. Above 1 the step raised the loss of the probe batch. Gaps are steps that raised it at any length, "
        "or at none within reach.",
        ("curvature/critical_ratio",),
        optional=True,
    ),
    Section(
        "agreement",
        "Local models along the step",
        spectra.agreement,
        "Change of the loss over what gradient and curvature predict, and the part of the gradient's change that "
        "curvature leaves unexplained, relative to the gradient. Good: near 1 and well below 1. Far from that, "
        "quadratic reasoning about these steps, sharpness included, is doubtful.",
        ("curvature/model_agreement", "curvature/gns_ratio"),
        optional=True,
    ),
    Section(
        "spectrum",
        "Spectrum of the Hessian",
        spectra.spectrum,
        "How all eigenvalues are spread, from negative to positive, on logarithmic axes (the horizontal one linear "
        "within a thousandth of the largest); and how the ends move. Good: a bulk about zero that narrows, a few "
        "outliers to the right, for a classifier about as many as classes, and a negative side that shrinks.",
        ("spectrum/lambda_max",),
        optional=True,
    ),
    Section(
        "spectrum-split",
        "Spectrum, split into Gauss-Newton and the rest",
        spectra.spectrum_split,
        "The last spectrum and its two parts: Gauss-Newton, which has no negative side and holds the outliers, and "
        "what the bending of the network adds. Good: the rest narrow against the whole, and ever narrower.",
        ("spectrum/ggn_sharpness",),
        optional=True,
    ),
    Section(
        "step-ratio",
        "Step against the radius of the local model",
        figures.step_ratio,
        "Length of each step over its ghost radius, the distance out to which the Taylor series of the loss along the "
        "step is sure to converge. Good: well below 1 most of the time. Below 1 the step is safe; a little above it "
        "may still be; single steps above about 10 do damage. Triangles mark steps that clipping shortened, or would "
        "have in a dry run.",
        ("step/ghost_ratio",),
        "Add StepRadius() to the callbacks.",
    ),
    Section(
        "noise-scale",
        "Gradient noise scale",
        figures.noise_scale,
        "The batch size at which noise and signal of the gradient are equal, an estimate of the critical batch size: "
        "points as measured, line smoothed. Good: a batch at or below the line. Batches far above it waste samples; "
        "far below, a larger batch saves steps. It usually grows as the loss falls.",
        ("layer/noise_scale",),
        "Add LayerMonitor() to the callbacks.",
    ),
    Section(
        "update-ratio",
        "Update size by layer",
        figures.update_ratio,
        "Each layer's update relative to its weights, one step. Good: near 1e-3 (marked on the scale), say 3e-4 to "
        "3e-3, and alike across layers. Above 1e-2 the linear picture of a step is doubtful; below 1e-5 a layer is "
        "standing still. Layers that start at zero or are normalised sit higher at first.",
        ("layer/update_ratio/*",),
        "Add LayerMonitor() to the callbacks.",
    ),
    Section(
        "snr",
        "Gradient signal to noise by layer",
        figures.snr,
        "Squared signal over squared noise of each layer's gradient. Good: around or above 1 early, falling as the "
        "easy part of the data is learnt. Below 1 a step is mostly noise; grey cells found no signal.",
        ("layer/snr/*",),
        optional=True,
    ),
    Section(
        "throughput",
        "Throughput",
        figures.throughput,
        "Good: flat. Regular dips are measurements, validation or checkpoints; a slope down is a leak, or other work "
        "on the machine.",
        ("train/tokens_per_s",),
        optional=True,
    ),
    Section(
        "time",
        "Time spent by each callback",
        figures.callback_time,
        "Total over the run and share of wall-clock. Good: a few per cent for all monitors together; raise "
        "every_n_steps of the longest bar, or lower its budget, where it is more.",
        ("*/time_ms",),
        "Callbacks of evolute record what they cost; none ran.",
    ),
)
