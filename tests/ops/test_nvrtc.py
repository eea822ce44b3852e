"""What a kernel is launched with lies in memory as the driver reads it."""

import ctypes
import threading

import pytest
import torch

from vmamba.ops import nvrtc


class Pair(ctypes.Structure):
    _fields_ = (("first", ctypes.c_int), ("second", ctypes.c_longlong))


def read(address: int, kind: type) -> object:
    return kind.from_address(address).value


def test_arguments_lie_where_their_pointers_point() -> None:
    tensor, pair = torch.zeros(3), Pair(1, 2**40)
    layout = nvrtc._Arguments()
    for number in (7, -(2**31), 2**31 - 1):  # the second time in the same space
        pointers = layout.lay_out([tensor, number, pair, None, 0.25, True, tensor[1:]])
        assert len(pointers) == 7
        assert read(pointers[0], ctypes.c_void_p) == tensor.data_ptr()
        assert read(pointers[1], ctypes.c_int) == number
        assert pointers[2] == ctypes.addressof(pair)
        assert read(pointers[3], ctypes.c_void_p) is None
        assert read(pointers[4], ctypes.c_float) == 0.25
        assert read(pointers[5], ctypes.c_int) == 1
        assert read(pointers[6], ctypes.c_void_p) == tensor.data_ptr() + 4
    assert len(layout.lay_out([])) == 0
    assert layout.lay_out([pair])[0] == ctypes.addressof(pair)
    assert read(layout.lay_out([tensor])[0], ctypes.c_void_p) == tensor.data_ptr()  # not where the structure was
    pointers = layout.lay_out([nvrtc.Numbers(3, -4), tensor])
    assert [read(pointers[i], ctypes.c_int) for i in range(2)] == [3, -4]
    assert read(pointers[2], ctypes.c_void_p) == tensor.data_ptr()
    with pytest.raises(ValueError, match=r"\[2147483648\] does not fit in 32 bits"):
        layout.lay_out([2**31])
    with pytest.raises(TypeError, match="not 'rows'"):
        layout.lay_out(["rows"])


def test_threads_lay_out_in_their_own_space() -> None:
    layout = nvrtc._Arguments()
    mine = layout.lay_out([5])
    theirs = []
    thread = threading.Thread(target=lambda: theirs.append(read(layout.lay_out([6])[0], ctypes.c_int)))
    thread.start()
    thread.join()
    assert (read(mine[0], ctypes.c_int), theirs) == (5, [6])
