"""The one place where stored pixels become network values and back."""

import torch


def to_network(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 NHWC [0, 255] → float32 NCHW [-1, 1], channels-last in memory."""
    moved = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return (moved.to(torch.float32) / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Float NCHW [-1, 1] → uint8 NHWC [0, 255], rounded to nearest."""
    scaled = (images.to(torch.float32) * 127.5 + 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
