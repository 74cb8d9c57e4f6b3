"""The device: its arithmetic, and batches on it. To a GPU they are copied while it works on the batch before."""

from collections.abc import Iterator

import torch

from pipeline.stream.batches import Batch

OnDevice = tuple[Batch, torch.Tensor, torch.Tensor]
"""A batch; its pixels uint8 NHWC and its labels int64 [n] on the device."""


def set_up(deterministic: bool) -> None:
    """Refuse operations whose result varies, or let cuDNN choose by measuring; float32 means float32, not TF32."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[OnDevice]:
    """The same batches in the same order. For a GPU one more is drawn than was asked for."""
    if device.type == "cuda":
        yield from _copied_ahead(batches, device)
    else:
        for batch in batches:
            yield batch, torch.from_numpy(batch.image), torch.from_numpy(batch.label)


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[OnDevice]:
    """From pinned memory, on a stream of its own: only so does a copy run beside the kernels."""
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: OnDevice | None = None
    for batch in batches:
        pinned = [torch.from_numpy(array).pin_memory() for array in (batch.image, batch.label)]
        with torch.cuda.stream(copies):
            image, label = (tensor.to(device, non_blocking=True) for tensor in pinned)
        if waiting is not None:
            yield waiting
        kernels = torch.cuda.current_stream(device)
        kernels.wait_stream(copies)
        for tensor in (image, label):
            tensor.record_stream(kernels)  # so that its memory is not given away while a kernel reads it
        waiting = (batch, image, label)
    if waiting is not None:
        yield waiting
