"""The generative core: forward processes, predictions, one loss, one sampler. It knows tensors and no other folder.

process = VP()
prediction = Prediction("eps", process)
loss = denoising_loss(prediction, network, x0, grid_times(times, x0.shape[:-1], generator), noise)
x = sample(process, prediction.denoiser(network, clip=(-1, 1)), x_T, times, eta=1.0, generator=generator)
"""

from diffrl.diffusion.chain import DenoisingChain, Rollout, Transition, at_steps
from diffrl.diffusion.consistency import (
    Boundaries,
    KarrasBoundary,
    consistency_loss,
    consistency_sample,
    consistency_tangent,
    n_boundaries,
    pseudo_huber,
    scm_loss,
)
from diffrl.diffusion.exact import Gaussian, GaussianMixture
from diffrl.diffusion.guidance import ConditionalNetwork, LogProb, classifier_free, classifier_guided, drop_condition
from diffrl.diffusion.inpainting import Known, reconstruction_guided
from diffrl.diffusion.loss import (
    Weighting,
    denoising_loss,
    edm_weight,
    grid_times,
    loglogistic_times,
    lognormal_times,
    min_snr_weight,
    uniform_times,
)
from diffrl.diffusion.prediction import Clip, Denoise, Kind, Network, Prediction
from diffrl.diffusion.process import VE, VP, Process, RectifiedFlow, TrigFlow, discrete_grid, expand
from diffrl.diffusion.reflow import couple, curvature, distillation_loss, half_from, straightness
from diffrl.diffusion.sampler import SOLVERS, Churn, Langevin, Sampler, reverse_step, sample, solver_step

__all__ = [
    "SOLVERS",
    "VE",
    "VP",
    "Boundaries",
    "Churn",
    "Clip",
    "ConditionalNetwork",
    "Denoise",
    "DenoisingChain",
    "Gaussian",
    "GaussianMixture",
    "KarrasBoundary",
    "Kind",
    "Known",
    "Langevin",
    "LogProb",
    "Network",
    "Prediction",
    "Process",
    "RectifiedFlow",
    "Rollout",
    "Sampler",
    "Transition",
    "TrigFlow",
    "Weighting",
    "at_steps",
    "classifier_free",
    "classifier_guided",
    "consistency_loss",
    "consistency_sample",
    "consistency_tangent",
    "couple",
    "curvature",
    "denoising_loss",
    "discrete_grid",
    "distillation_loss",
    "drop_condition",
    "edm_weight",
    "expand",
    "grid_times",
    "half_from",
    "loglogistic_times",
    "lognormal_times",
    "min_snr_weight",
    "n_boundaries",
    "pseudo_huber",
    "reconstruction_guided",
    "reverse_step",
    "sample",
    "scm_loss",
    "solver_step",
    "straightness",
    "uniform_times",
]
