"""How torch computes on a GPU: repeatably, and in one precision for every policy."""

import os

import torch

from sgrl.errors import UserError


def prepare_device(device: torch.device | str) -> torch.device:
    """Set this process's torch up to train on a device; call it before anything runs there.

    On a GPU the same run then gives the same bits each time, in float32 throughout: without
    TensorFloat-32, which torch leaves to cuDNN's GRU and LSTM beside a SparseNet in float32, and
    with the deterministic algorithms where torch has them (it warns where it has none). These are
    settings of the whole process, and stay. On a CPU nothing is set.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Returns:
        The device.

    Raises:
        UserError: it is another, or there is no such GPU.
    """
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {device!r}: it must be cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"device {str(device)!r} is not supported: it must be cpu, cuda or cuda:N")
    if (device.index or 0) >= torch.cuda.device_count():
        cause = "sees none" if torch.version.cuda else "is built without CUDA"
        found = f"torch {torch.__version__} {cause}"
        if torch.cuda.device_count():
            found = f"torch sees {torch.cuda.device_count()}, counted from 0"
        raise UserError(f"no GPU for the device {str(device)!r}: {found}; leave the device at cpu")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read at the first matrix product
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else every empty tensor would be filled, which nothing here reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device
