"""What a callback may ask of a module, by shape, never by class."""

import inspect
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

LossOn = Tensor | tuple[Tensor, Tensor, Tensor]


@runtime_checkable
class ProbeLoss(Protocol):
    """A module that can evaluate its loss on a batch, with no side effect, as often as it is asked.

    Without this method a probe calls ``training_step`` with logging muted and restores what it can. Modules with
    rollouts, files, external calls or manual optimisation need it.
    """

    def loss_on(self, batch: Any) -> LossOn:
        """Return the loss, or ``(loss, logits [n, K], targets [n])``, of ``batch``."""
        ...


class TokenLoss(Protocol):
    """A module that reduces a policy-gradient loss over tokens, all it needs being keyword arguments of one call.

    ``PolicyLoss`` among the models is one. A mask callback takes tokens out of ``mask`` before the call; the
    tensors are those of the positions that predict the actions. ``temperature`` divides the logits.
    """

    temperature: float

    def forward(
        self,
        *,
        actions: Tensor,
        advantages: Tensor,
        mask: Tensor,
        hidden: Tensor | None = None,
        head: nn.Module | None = None,
        logits: Tensor | None = None,
        denominator_mask: Tensor | None = None,
    ) -> Any:
        """Return the loss of a batch of completions [B, T]; further arguments are its own affair."""
        ...


TOKEN_ARGUMENTS = frozenset(inspect.signature(TokenLoss.forward).parameters) - {"self"}


def is_token_loss(module: nn.Module) -> bool:
    """Say whether a module is called as a :class:`TokenLoss` is, by the names of its arguments."""
    return frozenset(inspect.signature(module.forward).parameters) >= TOKEN_ARGUMENTS


@runtime_checkable
class GaussianModule(Protocol):
    """A module that trains a set of Gaussians.

    Attributes:
        render_info: of the last training view, from ``training_step`` to ``on_train_batch_end``: ``means2d`` [1, N, 2]
            with its gradient retained, ``radii`` [1, N, 2], ``width``, ``height``.
        sh_active: degree of the spherical harmonics in use.
        depth_factor: share of the depth loss in use.
    """

    render_info: dict[str, Any]
    sh_active: int
    depth_factor: float

    def gaussian_parameters(self) -> dict[str, nn.Parameter]:
        """Return ``means`` [N, 3], ``scales`` [N, 3] (log), ``quats`` [N, 4], ``opacities`` [N] (logit), ``sh0``
        [N, 1, 3] and any others with a row a Gaussian.
        """
        ...

    def scene_extent(self) -> float:
        """Return the length that thresholds on size refer to."""
        ...

    def export_ply(self, path: str) -> None:
        """Write the scene as a file that viewers open."""
        ...

    def view(self, viewmat: Tensor, K: Tensor, width: int, height: int) -> Tensor:
        """Return the image [H, W, 3] in [0, 1] of a camera (world to camera, OpenCV axes), without a graph."""
        ...
