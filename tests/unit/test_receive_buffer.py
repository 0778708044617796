"""The receive buffer against the simplest model: a byte string with a moving start."""

from hypothesis import given
from hypothesis import strategies as st

from nbdserver.frontend.receive_buffer import NORMAL_BYTES, ReceiveBuffer

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("receive"), st.integers(1, 5000)),
        st.tuples(st.just("use"), st.integers(0, 6000)),
        st.tuples(st.just("reserve"), st.integers(1, 20000)),
        st.tuples(st.just("shrink"), st.just(0)),
        st.tuples(st.just("set aside"), st.integers(0, 6000)),
    ),
    max_size=40,
)


@given(start_bytes=st.integers(16, 9000), steps=STEPS)
def test_bytes_stay_in_order_whatever_moves_grows_or_shrinks(start_bytes: int, steps: list[tuple[str, int]]) -> None:
    buffer = ReceiveBuffer(start_bytes)
    held = aside = b""
    count = 0
    for step, size_bytes in steps:
        if step == "receive":
            room = buffer.room()
            size_bytes = min(size_bytes, len(room))
            data = bytes((count + index) % 251 for index in range(size_bytes))
            count += size_bytes
            room[:size_bytes] = data
            buffer.end += size_bytes
            held += data
        elif step == "use":
            size_bytes = min(size_bytes, len(held))
            assert buffer.used(buffer.start + size_bytes) == buffer.start
            held = held[size_bytes:]
        elif step == "set aside":
            size_bytes = min(size_bytes, len(held))
            buffer.set_aside(buffer.start + size_bytes)
            aside, held = held[:size_bytes], held[size_bytes:]
        elif step == "reserve":
            buffer.reserve(size_bytes)
            assert buffer.start + size_bytes <= buffer.capacity_bytes
        else:
            buffer.shrink()
        assert buffer.view[buffer.start : buffer.end] == held
        assert buffer.aside == aside
        assert len(buffer.room()) > 0 or buffer.end - buffer.start == buffer.capacity_bytes


def test_a_grown_buffer_shrinks_when_little_is_held() -> None:
    buffer = ReceiveBuffer()
    buffer.put(b"abc")
    buffer.reserve(NORMAL_BYTES * 2)
    assert buffer.capacity_bytes == NORMAL_BYTES * 2
    assert buffer.shrink()
    assert buffer.capacity_bytes == NORMAL_BYTES
    assert bytes(buffer.view[buffer.start : buffer.end]) == b"abc"
