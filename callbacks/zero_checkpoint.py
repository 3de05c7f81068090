"""A DeepSpeed checkpoint, a directory with a file for every process, read as one ordinary checkpoint.

Neither DeepSpeed nor as many processes are needed to read one, and nothing is unpickled but tensors and plain data. The
layout is that of DeepSpeed 0.19 (``deepspeed/utils/zero_to_fp32.py`` reads the same files); a test compares the two.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

_OWN = {
    *("module", "buffer_names", "shared_params", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
    *("optimizer", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "num_experts"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size"),
    *("checkpoint_parallel_dimensions", "ds_config", "ds_version"),
}
"""What DeepSpeed adds to the content of a checkpoint."""


class _Plain:
    """Stands for a class of DeepSpeed, of which only the attributes are read."""


class _Number(int):
    """Stands for an enumeration of DeepSpeed."""


_KNOWN: list[Any] = [
    (_Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Number, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


def layout(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the ZeRO stage of a DeepSpeed checkpoint and the number of processes that wrote it.

    Raises:
        ValueError: if files are missing, or what is read of them was truncated.
    """
    _, pieces = _files(Path(path))
    return int(_load(pieces[0], "meta")["optimizer_state_dict"]["zero_stage"]), len(pieces)


def load_checkpoint(path: str | os.PathLike[str], device: str = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint, a file or a DeepSpeed directory, as a single process would have saved it.

    Of a directory: ``state_dict`` with the float32 masters, ``optimizer_states`` with whole moments in the order of
    the parameter groups, and everything that Lightning and callbacks saved on the first process.

    Args:
        path: file or directory.
        device: where tensors go; ``"meta"`` reads their shapes only.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is no checkpoint, or was truncated.
    """
    path = Path(path)
    return _joined(path, device) if path.is_dir() else _load(path, device)


def _load(file: Path, device: str) -> dict[str, Any]:
    file.open("rb").close()  # whether it can be read; later errors, OSError among them, are of its content
    try:
        with safe_globals(_KNOWN):
            content = torch.load(file, weights_only=True, map_location=device, mmap=device == "meta")
    except Exception as error:  # zip, pickle and end-of-file errors, which tell the user no more than this
        raise ValueError(f"{file} is no checkpoint, or was truncated") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no checkpoint")
    return content


def _files(path: Path) -> tuple[Path, list[Path]]:
    """Return the file with everything that is not sharded, and the pieces of the optimizer in the order of ranks."""
    latest = path / "latest"
    if not latest.is_file():
        raise ValueError(f"{path} is no checkpoint, or was truncated: it has no file 'latest'")
    folder = path / latest.read_text().strip()
    models = [folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"]
    model = next((file for file in models if file.is_file()), None)
    pieces: dict[int, Path] = {}
    for file in folder.glob("*zero_pp_rank_*_optim_states.pt"):
        rank = re.search(r"zero_pp_rank_(\d+)_", file.name)
        assert rank is not None
        pieces[int(rank[1])] = file
    if model is None or not pieces:
        raise ValueError(f"{path} is no DeepSpeed ZeRO checkpoint, or was truncated")
    ranks = int(_load(model, "meta")["dp_world_size"])
    if sorted(pieces) != list(range(ranks)):
        raise ValueError(f"{path} was truncated: it holds the pieces of {len(pieces)} of {ranks} processes")
    return model, [pieces[rank] for rank in range(ranks)]


def _joined(path: Path, device: str) -> dict[str, Any]:
    model_file, piece_files = _files(path)
    model = _load(model_file, device)
    pieces = [_load(file, device)["optimizer_state_dict"] for file in piece_files]
    try:
        join = _Join(model["param_shapes"], pieces)
        state_dict = {name: model["module"][name] for name in model["buffer_names"]}
        state_dict |= _frozen(path, model, join.stage, device)
        state_dict |= join.tensors([piece[join.key] for piece in pieces])
        for name, same in model["shared_params"].items():
            state_dict[name] = state_dict[same]
        content = {key: value for key, value in model.items() if key not in _OWN}
        return {**content, "state_dict": state_dict, "optimizer_states": [join.optimizer_state()]}
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is not laid out as DeepSpeed 0.19 does ({error})") from error


def _frozen(path: Path, model: dict[str, Any], stage: int, device: str) -> dict[str, Tensor]:
    """Return the parameters that no optimizer has; in stage 3 their pieces lie in the model file of each process."""
    shapes = model.get("frozen_param_shapes") or {}
    if not shapes or stage < 3:
        return dict(model.get("frozen_param_fragments") or {})
    folder = path / (path / "latest").read_text().strip()
    fragments = [
        _load(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", device)["frozen_param_fragments"]
        for rank in range(int(model["dp_world_size"]))
    ]
    return {name: _cut(torch.cat([f[name] for f in fragments]), shape) for name, shape in shapes.items()}


class _Join:
    """Puts flat pieces of the ranks together again.

    In stages 1 and 2 the parameters of a group are joined end to end and the whole is cut into as many pieces as there
    are ranks. In stage 3 each parameter is cut, padded, and a rank's pieces of a group are joined.
    """

    def __init__(self, shapes: list[dict[str, torch.Size]], pieces: list[dict[str, Any]]) -> None:
        self.shapes = shapes
        self.pieces = pieces
        self.stage = int(pieces[0]["zero_stage"])
        self.key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        self.paddings = pieces[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]

    def tensors(self, flats: list[list[Tensor]]) -> dict[str, Tensor]:
        """Return whole tensors by name from ``flats[rank][group]``."""
        found: dict[str, Tensor] = {}
        for group in range(len(self.shapes)):
            found |= self.group(group, [rank[group] for rank in flats])
        return found

    def group(self, group: int, flats: list[Tensor]) -> dict[str, Tensor]:
        """Return the whole tensors of one flat group from the piece of each rank."""
        found: dict[str, Tensor] = {}
        offset = 0
        if self.stage == 3:
            for name, shape in self.shapes[group].items():
                size = -(-shape.numel() // len(flats))
                found[name] = _cut(torch.cat([flat.narrow(0, offset, size) for flat in flats]), shape)
                offset += size
            return found
        joint = torch.cat(flats)
        for (name, shape), padding in zip(self.shapes[group].items(), self.paddings[group], strict=True):
            found[name] = _cut(joint[offset:], shape)
            offset += shape.numel() + padding
        return found

    def optimizer_state(self) -> dict[str, Any]:
        """Return the state of the optimizer as torch saves it: parameters numbered through the groups."""
        bases = [piece["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"] for piece in self.pieces]
        states: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for options in bases[0]["param_groups"]:
            numbers: list[int] = []
            for flat in options["params"]:  # one in stages 1 and 2, in stage 3 one for each of its sub-groups
                first = len(states)
                numbers += range(first, first + len(self.shapes[flat]))
                states |= self._states(first, flat, [base["state"].get(flat, {}) for base in bases])
            groups.append({**options, "params": numbers})
        return {"state": {number: state for number, state in states.items() if state}, "param_groups": groups}

    def _states(self, first: int, flat: int, ranks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {first + i: {} for i in range(len(self.shapes[flat]))}
        for key, value in ranks[0].items():
            if isinstance(value, Tensor) and value.ndim:
                whole = list(self.group(flat, [rank[key] for rank in ranks]).values())
            else:
                whole = [value.clone() if isinstance(value, Tensor) else value for _ in found]
            for state, tensor in zip(found.values(), whole, strict=True):
                state[key] = tensor
        return found


def _cut(flat: Tensor, shape: torch.Size) -> Tensor:
    """Return the first elements of a flat tensor in a shape, with storage of their own: it may be saved again."""
    return flat[: shape.numel()].clone().view(shape)
