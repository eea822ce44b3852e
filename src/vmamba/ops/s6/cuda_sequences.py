"""The gradients of the selective scan with several states a channel as CUDA: 16 bits, capability 8.0 and newer.

Channels are laid side by side first; the recurrence is then that of `vmamba.ops.ss2d.cuda_states`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmamba.ops import nvrtc
from vmamba.ops.ss2d import cuda_states as shared


def find_images(batch: int, groups: int, length: int, channels: int, states: int) -> int:
    """Choose how many images to take at once, so that what is held besides the gradients stays below the inputs.

    Args:
        batch: entries.
        groups: K, of channels that share B and C.
        length: L.
        channels: E, of a group.
        states: N.

    Returns:
        0 if one is too many.
    """
    chunks = -(-length // shared.SPAN)
    budget = shared.SHARE_OF_INPUTS * batch * length * 4 * (channels + states)  # of each group
    budget -= batch * length * 4 * states  # B and C of all entries, side by side
    held = length * (14 * channels + 20 * states) + chunks * channels * 4 * (2 * states + 1)
    most = min(batch, int(budget / held))
    return -(-batch // -(-batch // most)) if most else 0


def why_not(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_softplus: bool) -> str | None:
    """Say why this backward cannot or should not take the inputs, or return None when it does."""
    unavailable = nvrtc.compiler_unavailable()
    if unavailable is not None:
        return unavailable
    if not u.is_cuda:
        return f"the CUDA backward needs CUDA tensors, and u is on {u.device}."
    if u.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA backward takes bfloat16 or float16 sequences, and u is {u.dtype}."
    if not delta_softplus:
        return "the CUDA backward is for steps that go through softplus."
    (batch, channels, length), groups, states = u.shape, B.shape[1], A.shape[-1]
    if not 1 < states <= shared.MAX_STATES:
        return f"the CUDA backward is for 2 to {shared.MAX_STATES} states a channel, and A has {states}."
    if length * max(channels // groups, 2 * states) >= 2**30:
        return f"the CUDA backward takes fewer than 2**30 values of a sequence, and u has {length} of {channels}."
    if (unfit := nvrtc.device_unfit(u.device)) is not None:
        return unfit
    if torch.are_deterministic_algorithms_enabled():
        return "the CUDA backward adds in no fixed order, and deterministic algorithms are asked for."
    if not find_images(batch, groups, length, channels // groups, states):
        return f"the CUDA backward would hold more than its inputs for a batch of {batch}."
    return None


def backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    images: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of `vmamba.ops.selective_scan` with `delta_softplus`; states are recomputed.

    Args:
        dy: (B, K·E, L).
        u: (B, K·E, L), bfloat16 or float16.
        delta: (B, K·E, L), as u.
        A: (K·E, N), float32.
        B: (B, K, N, L), as u.
        C: as B.
        D: (K·E), float32.
        delta_bias: (K·E), float32.
        images: how many to take at once, in place of what `find_images` chooses.

    Returns:
        The gradients of u, delta, A, B, C, D and delta_bias, each in the dtype of its input.

    Raises:
        ValueError: the batch is so small that the workspace would outweigh the inputs.
    """
    (batch, K, N, length), channels, device = B.shape, u.shape[1] // max(B.shape[1], 1), u.device
    dy, u, delta = dy.float().contiguous(), u.contiguous(), delta.contiguous()
    du, ddelta, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, B, C))
    dbias, dA, dD = (torch.zeros(K, n, channels, dtype=torch.float64, device=device) for n in (1, N, 1))
    if u.numel():
        images = images or find_images(batch, K, length, channels, N)
        if not images:
            raise ValueError(f"the CUDA backward would hold more than its inputs for a batch of {batch}.")
        zeros = A.new_zeros(K * channels)
        bias = zeros if delta_bias is None else delta_bias.contiguous()
        skip = zeros if D is None else D.contiguous()
        rates = A.view(K, channels, N).transpose(1, 2).contiguous()
        count = images * K
        raw, states, adjoints, steps, sums, dx = shared.allocate(count, count, length, channels, N, device)
        x = torch.empty(count * length * channels, dtype=u.dtype, device=device)
        turned = torch.empty(count * length * channels, dtype=torch.float32, device=device)
        defines = shared.states_defines(1, N, u.dtype, torch.float32, None)
        kernels = shared.find_kernels(shared.SEQUENCE_KERNELS, defines, device)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        both = torch.cat((B, C), 2).transpose(2, 3).contiguous()
        inputs = (x, turned, both, None, bias, rates, skip)
        held = (raw, states, adjoints, steps, sums, dx, None, None, dbias, dA, dD)
        pointers = [None if t is None else t.data_ptr() for t in (*inputs, *held, u, delta, dy, du, ddelta)]
        sizes = (length, channels, -(-channels // shared.CHANNELS), -(-length // shared.SPAN), 0, 0, K, 1, length)
        problem = shared.Problem(*pointers, *sizes)
        ends = {"projected": both, "u": u, "delta": delta, "sequences_dy": dy, "du": du, "ddelta": ddelta}
        for start in range(0, batch, images):
            problem.images = n_images = min(images, batch - start)
            for name, tensor in ends.items():
                setattr(problem, name, shared.find_image(tensor, start))
            dx.zero_()
            sums.zero_()
            shared.run(shared.SEQUENCE_KERNELS, kernels, problem, N, multiprocessors)
            found = sums[: n_images * K * length * 2 * N].view(n_images, K, length, 2 * N) * shared.TRUNCATED
            some = slice(start, start + n_images)
            dB[some], dC[some] = (part.transpose(2, 3) for part in found.split(N, 3))
    return (
        du,
        ddelta,
        dA.transpose(1, 2).reshape(A.shape).to(A.dtype),
        dB,
        dC,
        None if D is None else dD.flatten().to(D.dtype),
        None if delta_bias is None else dbias.flatten().to(delta_bias.dtype),
    )
