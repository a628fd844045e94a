"""Memory that is used again: never while something still lies in it, and always after."""

import threading

import torch

from moeglot import scratch


def test_a_buffer_is_used_again_once_nothing_lies_in_it():
    first = scratch.empty((1 << 20,), torch.int32)
    place = first.data_ptr()
    assert place % 4096 == 0
    second = scratch.empty((1 << 20,), torch.int32)
    assert second.data_ptr() != place
    first.fill_(1)
    second.fill_(2)
    view = first[5:].view(torch.uint8)
    del first
    third = scratch.empty((1 << 20,), torch.int32)  # a view still lies in the first
    assert third.data_ptr() not in (place, second.data_ptr())
    assert view[0] == 1
    del view
    assert scratch.empty((1 << 21,), torch.int16).data_ptr() == place


def test_what_is_handed_on_as_numpy_or_bytes_is_not_used_again():
    for hold in (lambda tensor: tensor.numpy(), lambda tensor: memoryview(tensor.numpy().data)):
        tensor = scratch.empty((1 << 21,), torch.uint8)
        tensor.fill_(7)
        place, held = tensor.data_ptr(), hold(tensor)
        del tensor
        assert scratch.empty((1 << 21,), torch.uint8).data_ptr() != place
        assert held[0] == 7


def test_another_thread_has_its_own():
    places = []
    mine = scratch.empty((1 << 21,), torch.uint8).data_ptr()
    held = scratch.empty((1 << 21,), torch.uint8)
    thread = threading.Thread(target=lambda: places.append(scratch.empty((1 << 21,), torch.uint8).data_ptr()))
    thread.start()
    thread.join()
    assert places[0] not in (mine, held.data_ptr())


def test_few_free_buffers_are_kept():
    """In a thread that begins with none."""
    kept = []

    def take() -> None:
        for n in range(21, 27):
            scratch.empty((1 << n,), torch.uint8)
            kept.append(sum(map(len, scratch._of_thread.buffers[:-1])))

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert 0 < max(kept) <= scratch.KEPT
