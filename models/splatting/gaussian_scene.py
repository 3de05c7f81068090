"""The trained form of a scene: logarithms, logits and harmonics as parameters."""

import torch
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch.nn import functional as F

from evolute.models.splatting.harmonics import C0, MAX_DEGREE, harmonics
from evolute.models.splatting.scene import Camera, Gaussians

NAMES = ("means", "scales", "quats", "opacities", "sh0", "shN")
"""Parameters of a scene, each with one row a Gaussian."""
NEIGHBOURS = 3


class GaussianScene(nn.Module):
    """Gaussians as parameters without bounds, one row a Gaussian, in the layout of gsplat and of 3DGS files.

    Args:
        n: number of Gaussians.
        sh_degree: largest degree of the harmonics, 0 to 3.

    Attributes:
        params: ``means`` [N, 3], ``scales`` [N, 3] (log), ``quats`` [N, 4] (w x y z), ``opacities`` [N] (logit),
            ``sh0`` [N, 1, 3], ``shN`` [N, (sh_degree + 1)^2 - 1, 3].

    Raises:
        ValueError: if the degree is out of range.
    """

    def __init__(self, n: int, sh_degree: int = 3) -> None:
        super().__init__()
        if not 0 <= sh_degree <= MAX_DEGREE:
            raise ValueError(f"GaussianScene(sh_degree={sh_degree}): must be 0 to {MAX_DEGREE}")
        self.sh_degree = sh_degree
        shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": ()}
        shapes |= {"sh0": (1, 3), "shN": ((sh_degree + 1) ** 2 - 1, 3)}
        self.params = nn.ParameterDict({name: nn.Parameter(torch.zeros(n, *shapes[name])) for name in NAMES})

    @classmethod
    def from_points(
        cls,
        points: Tensor,
        colors: Tensor,
        sh_degree: int = 3,
        opacity: float = 0.1,
        scale: float = 1.0,
        normals: Tensor | None = None,
        flatness: float = 0.1,
    ) -> "GaussianScene":
        """Return one Gaussian a point: as wide as the mean distance to its three neighbours.

        Args:
            points: centres [N, 3].
            colors: [N, 3] in [0, 1].
            sh_degree: of the scene.
            opacity: of every Gaussian.
            scale: factor of the width.
            normals: unit vectors [N, 3]; the third axis is laid along them and made ``flatness`` as wide as the others,
                so that Gaussians start as discs on the surface. None leaves them round.
            flatness: see ``normals``.
        """
        scene = cls(len(points), sh_degree)
        k = min(NEIGHBOURS, max(len(points) - 1, 1))
        tree = KDTree(points.double().numpy())
        distances = torch.from_numpy(tree.query(points.double().numpy(), k=k + 1)[0]).reshape(len(points), -1)
        finite = torch.where(distances.isfinite(), distances, torch.zeros_like(distances))
        width = (scale * finite[:, 1:].mean(-1)).clamp_min(1e-6).float()
        params = scene.params
        with torch.no_grad():
            params["means"].copy_(points)
            params["scales"].copy_(width.log()[:, None].expand(-1, 3))
            params["quats"][:, 0] = 1.0
            if normals is not None:
                params["quats"].copy_(_turn_z_to(normals))
                params["scales"][:, 2] += torch.log(torch.tensor(flatness))
            params["opacities"].fill_(torch.logit(torch.tensor(opacity)))
            params["sh0"].copy_(((colors - 0.5) / C0)[:, None])
        return scene

    def __len__(self) -> int:
        return self.params["means"].shape[0]

    def resize(self, n: int) -> None:
        """Give every parameter ``n`` rows of zeros, to be filled: before a checkpoint of that size is loaded.

        The parameters stay the same objects.
        """
        for p in self.params.values():
            p.data = p.new_zeros(n, *p.shape[1:])

    def gaussians(self, camera: Camera, degree: int | None = None, extra: Tensor | None = None) -> Gaussians:
        """Return what :func:`evolute.models.splatting.render` takes, with colours as seen from the camera.

        Args:
            camera: the view.
            degree: harmonics used; all by default.
            extra: further channels [N, E] behind the three of colour.
        """
        p = self.params
        colors = self.colors(camera.position.to(p["means"]), degree)
        return Gaussians(
            means=p["means"],
            scales=p["scales"].exp(),
            quats=p["quats"],
            opacities=p["opacities"].sigmoid(),
            colors=colors if extra is None else torch.cat([colors, extra], -1),
        )

    def colors(self, position: Tensor, degree: int | None = None) -> Tensor:
        """Return colours [N, 3], at least 0, seen from a position [3]."""
        p, degree = self.params, self.sh_degree if degree is None else degree
        if degree == 0:
            return (C0 * p["sh0"][:, 0] + 0.5).clamp_min(0)
        basis = harmonics(degree, F.normalize(p["means"].detach() - position, dim=-1))
        coefficients = torch.cat([p["sh0"], p["shN"][:, : basis.shape[1] - 1]], 1)
        return ((basis[..., None] * coefficients).sum(1) + 0.5).clamp_min(0)

    def base_colors(self) -> Tensor:
        """Return colours [N, 3] without their dependence on direction, in [0, 1], detached."""
        return (C0 * self.params["sh0"].detach()[:, 0] + 0.5).clamp(0, 1)

    def normals(self, camera: Camera) -> Tensor:
        """Return the axis of the smallest scale [N, 3] in camera coordinates, turned towards the camera."""
        from evolute.models.splatting.projection import rotations

        camera = camera.to(self.params["means"])
        turns = rotations(self.params["quats"])
        thinnest = self.params["scales"].detach().argmin(-1)
        axis = turns.gather(2, thinnest[:, None, None].expand(-1, 3, 1))[..., 0] @ camera.viewmat[:3, :3].T
        towards = (axis * camera.local(self.params["means"])).sum(-1, keepdim=True).detach() < 0
        return torch.where(towards, axis, -axis)


def _turn_z_to(normals: Tensor) -> Tensor:
    """Return quaternions [N, 4] that turn the z axis to unit vectors [N, 3]."""
    x, y, z = normals.unbind(-1)
    half = torch.stack([1 + z, -y, x, torch.zeros_like(x)], -1)
    upside_down = torch.tensor([0.0, 1.0, 0.0, 0.0]).to(half)
    return F.normalize(torch.where((z < -1 + 1e-6)[:, None], upside_down, half), dim=-1)
