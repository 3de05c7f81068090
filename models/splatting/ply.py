"""Scenes as the .ply files that 3D Gaussian viewers open."""

import math
from pathlib import Path

import numpy as np
import torch

from evolute.models.splatting.gaussian_scene import GaussianScene


def write_ply(scene: GaussianScene, path: str | Path) -> Path:
    """Write a scene, binary little-endian float32: x y z, f_dc, f_rest (all of red, of green, of blue), opacity, scale,
    rot. The file appears whole or not at all.
    """
    from plyfile import PlyData, PlyElement

    p = {name: value.detach().cpu().float() for name, value in scene.params.items()}
    n = len(scene)
    blocks = {
        "xyz": p["means"],
        "f_dc": p["sh0"].reshape(n, 3),
        "f_rest": p["shN"].transpose(1, 2).reshape(n, -1),
        "opacity": p["opacities"][:, None],
        "scale": p["scales"],
        "rot": p["quats"],
    }
    columns = list("xyz")
    for name in ("f_dc", "f_rest", "opacity", "scale", "rot"):
        width = blocks[name].shape[1]
        columns += ["opacity"] if name == "opacity" else [f"{name}_{i}" for i in range(width)]
    rows = np.ascontiguousarray(torch.cat(list(blocks.values()), 1).numpy(), dtype="<f4")
    vertex = rows.view([(name, "<f4") for name in columns])[:, 0]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<").write(str(part))
    part.replace(path)
    return path


def read_ply(path: str | Path) -> GaussianScene:
    """Read a scene, whatever the order of its properties.

    Raises:
        ValueError: naming the file, if it cannot be read, lacks a property or has an odd number of harmonics.
    """
    from plyfile import PlyData, PlyParseError

    try:
        vertex = PlyData.read(str(path))["vertex"]
    except (PlyParseError, OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable .ply of Gaussians ({error})") from error
    held = [p.name for p in vertex.properties]
    rest = sorted((name for name in held if name.startswith("f_rest_")), key=lambda name: int(name.split("_")[-1]))
    wanted = {
        "means": list("xyz"),
        "scales": [f"scale_{i}" for i in range(3)],
        "quats": [f"rot_{i}" for i in range(4)],
        "opacities": ["opacity"],
        "sh0": [f"f_dc_{i}" for i in range(3)],
        "shN": rest,
    }
    missing = [name for names in wanted.values() for name in names if name not in held]
    if missing:
        raise ValueError(f"{path}: not a scene of Gaussians, it lacks the properties {', '.join(missing)}")
    degree = math.isqrt(len(rest) // 3 + 1) - 1
    if len(rest) != 3 * ((degree + 1) ** 2 - 1) or degree > 3:
        raise ValueError(
            f"{path}: {len(rest)} f_rest properties are no whole degree of spherical harmonics (0, 9, 24, 45)"
        )
    scene = GaussianScene(len(vertex.data), degree)
    with torch.no_grad():
        for name, names in wanted.items():
            columns = [torch.from_numpy(np.asarray(vertex[c], np.float32).copy()) for c in names]
            p = scene.params[name]
            if name == "shN":
                p.copy_(torch.stack(columns, 1).reshape(len(p), 3, -1).transpose(1, 2) if columns else p)
            else:
                p.copy_(torch.stack(columns, 1).reshape(p.shape))
    return scene
