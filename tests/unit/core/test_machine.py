from graft.core.machine import free_host_bytes, host_memory_bytes


def test_what_is_free_is_a_part_of_what_there_is() -> None:
    assert 0 < free_host_bytes() < host_memory_bytes()
