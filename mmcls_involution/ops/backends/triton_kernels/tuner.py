"""Which blocks the Triton kernels run with: timed once, by threads in turn."""

from __future__ import annotations

import logging
import threading

import torch
import triton

logger = logging.getLogger(__name__)

_announced = False
# Triton's tuner keeps the arguments of a call on itself. One for all tuners, since two
# that time at once would time each other.
_tuning = threading.RLock()
_thread = threading.local()


def pin_this_thread() -> None:
    """From now on its kernels have the first blocks, and are not timed."""
    _thread.pinned = True


def candidates(configs, tensors, **constants):
    """What the tuner times, the one first that serves where nothing is timed."""
    if constants['DH'] > 1:  # dilated rows share no tiles
        return [config for config in configs if config.kwargs['ROWS'] == 1]
    return configs


class _Untimed(Exception):
    """Nothing can be timed now."""


def _cold_cache() -> torch.Tensor:
    """What Triton overwrites before each round, so that it finds the L2 cold."""
    size = 2 * torch.cuda.get_device_properties('cuda').L2_cache_size
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if size > free:
        raise _Untimed
    return torch.empty(size, dtype=torch.int8, device='cuda')


def _time(call, quantiles):
    """Triton's own timing, with a buffer of another size."""
    global _announced
    if torch.cuda.is_current_stream_capturing():
        raise _Untimed
    if not _announced:
        _announced = True
        logger.warning(
            'Triton compiles and times the kernels of involution. That takes up to '
            'some minutes when a model runs for the first time; the result is kept.'
        )
    driver = triton.runtime.driver.active
    driver.get_empty_cache_for_benchmark = _cold_cache
    try:
        return triton.testing.do_bench(call, warmup=5, rep=30, quantiles=quantiles)
    except torch.OutOfMemoryError as error:
        raise _Untimed from error
    finally:
        del driver.get_empty_cache_for_benchmark


class _Tuner(triton.runtime.Autotuner):
    """For threads, and with the first candidate where nothing can or shall be timed.

    Of what could not be timed, while a CUDA graph was captured or without memory, it
    keeps nothing: the next call tries again. Choices from memory and disk hold there
    too. The first kernels of a process can be loaded during a capture by drivers for
    CUDA 12.3 and newer; others want one call before it, as torch's own kernels do.
    """

    def run(self, *args, **kwargs):
        with _tuning:
            # The bits of the kernels' gradient depend on the blocks.
            pinned = torch.are_deterministic_algorithms_enabled()
            pinned |= triton.knobs.runtime.interpret or hasattr(_thread, 'pinned')
            if not pinned:
                try:
                    return super().run(*args, **kwargs)
                except _Untimed:
                    pass
            self.nargs = dict(zip(self.arg_names, args, strict=False))
            first = self.prune_configs(kwargs)[0]
            return self.fn.run(*args, **kwargs, **first.all_kwargs())


def tuned(configs):
    """Makes kernels that are tuned for what `key` names, specialized for no size."""
    sizes = [
        *('batch', 'height', 'width', 'out_height', 'out_width'),
        *('pad_height', 'pad_width', 'size_class'),
    ]
    key = [
        *('KH', 'KW', 'SH', 'SW', 'DH', 'DW'),
        *('GROUP_CHANNELS', 'CHANNELS_LAST', 'size_class'),
    ]

    def decorate(function):
        kernel = triton.jit(function, do_not_specialize=sizes)
        return _Tuner(
            kernel,
            kernel.arg_names,
            configs,
            key=key,
            reset_to_zero=None,
            restore_value=None,
            prune_configs_by=dict(early_config_prune=candidates),
            do_bench=_time,
            cache_results=True,
        )

    return decorate
