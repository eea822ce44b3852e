"""SS2D's core in ONNX operators: functions of the domain "vmamba" that any runtime of the standard operators can run.

All routes of a map are one tensor: a `Gather` reads their positions into sequences of T ≥ H·W steps (those past the end
are read and never looked at), another puts them back. The recurrence runs on three levels. T is cut into chunks of 7
steps, and these into groups of up to 7 chunks. An ONNX `Scan` over 7 steps, all chunks at once, finds the state in
which each chunk would end had it started from zero, and by how much it lets a state decay; the same over the chunks of
a group, and a `Scan` over the groups, turn these into the states in which the chunks really start; a last `Scan` over 7
steps runs the recurrence from there. A map takes 14 large steps, 14 middle ones and H·W/49 small ones in place of
H·W. Every step is `a·h + b` as in the recurrence itself: nothing is divided by a decay, and no exponential is taken
but that of Δ·A, so nothing overflows that the recurrence would not.

Layout inside: [M, K, M₂, Q, B, E] for step, route, chunk of a group, group, image and channel; step t of a sequence is
at (Q-index·M₂ + M₂-index)·M + M-index. All sizes but K, N and R are dynamic. What depends on H and W alone is the same
in all blocks of a stage; onnxruntime computes it once.
"""

from collections.abc import Sequence

from vmamba.ops.routes import Route, get_routes

DOMAIN = "vmamba"
OPSET = 20
# Maps of 7·2ⁿ positions a side need no padding.
CHUNK_STEPS = 7

# log1p(exp(-|z|)) as 2 artanh(s), s = 1/(1 + 2 exp|z|) ≤ 1/3, which keeps the digits of small Δ. In terms of t = 2s it
# is t·r(t²) with r rational, by minimax to a relative 1.4e-8. HardSigmoid is αt² + β in one operator; its bounds of 0
# and 1 are never met. onnxruntime runs Log and Softplus one number at a time, nine and sixty times as long as these.
_SOFTPLUS = """
Softplus (z) => (y)
{
  half = Constant<value_float = 0.5>()
  pole = Constant<value_float = 5.5182118307074965>()
  residue = Constant<value_float = 2.0987703729513574>()
  size = Abs(z)
  power = Exp(size)
  below = Add(power, half)
  t = Reciprocal(below)
  t2 = Mul(t, t)
  to_pole = Sub(pole, t2)
  fraction = Div(residue, to_pole)
  linear = HardSigmoid<alpha = 0.01441062394100731, beta = 0.6196647551705807>(t2)
  ratio = Add(linear, fraction)
  log1p = Mul(t, ratio)
  positive = Relu(z)
  y = Add(positive, log1p)
}
"""

_STEP = "ah = Mul(a, h) next = Add(ah, b)"
_ENDS = (
    "Scan<num_scan_inputs = 2, body = ends (float[] h, float[] decay, float[] a, float[] b) => "
    f"(float[] next, float[] decayed) {{ {_STEP} decayed = Mul(decay, a) }}>"
)
_STARTS = (
    "Scan<num_scan_inputs = 2, body = starts (float[] h, float[] a, float[] b) => "
    f"(float[] next, float[] start) {{ start = Identity(h) {_STEP} }}>"
)
_OUTPUTS = (
    "Scan<num_scan_inputs = 3, body = outputs (float[] h, float[] a, float[] b, float[] c) => "
    f"(float[] next, float[] ch) {{ {_STEP} ch = Mul(next, c) }}>"
)

# c_t h_t of h_t = a_t h_{t-1} + b_t. Inputs: a, b [M, K, M₂, Q, B, E]; c [M, K, M₂, Q, B, 1].
_RECURRENCE = f"""
Recurrence (a, b, c) => (y)
{{
  chunk = Shape<start = 1>(a)
  chunk_zero = ConstantOfShape<value = float[1] {{0.0}}>(chunk)
  chunk_one = ConstantOfShape<value = float[1] {{1.0}}>(chunk)
  chunk_end, chunk_a = {_ENDS}(chunk_zero, chunk_one, a, b)
  a2 = Transpose<perm = [1, 2, 0, 3, 4]>(chunk_a)
  b2 = Transpose<perm = [1, 2, 0, 3, 4]>(chunk_end)
  group = Shape<start = 1>(a2)
  group_zero = ConstantOfShape<value = float[1] {{0.0}}>(group)
  group_one = ConstantOfShape<value = float[1] {{1.0}}>(group)
  group_end, group_a = {_ENDS}(group_zero, group_one, a2, b2)
  map = Shape<start = 1>(group_a)
  map_zero = ConstantOfShape<value = float[1] {{0.0}}>(map)
  map_end, group_start = {_STARTS}(map_zero, group_a, group_end)
  last, start2 = {_STARTS}(group_start, a2, b2)
  chunk_start = Transpose<perm = [2, 0, 1, 3, 4]>(start2)
  end, y = {_OUTPUTS}(chunk_start, a, b, c)
}}
"""


def scan_name(routes: str, d_state: int, dt_rank: int, flip_back: bool) -> str:
    """Name the function that `scan` writes."""
    return f"SS2DScan_{routes}_N{d_state}_R{dt_rank}" + ("" if flip_back else "_unturned")


def scan(routes: str, d_state: int, dt_rank: int, flip_back: bool) -> str:
    """Write the function that computes `vmamba.ops.ss2d_scan` in float32.

    Inputs: as those of `vmamba.ops.ss2d_scan`, in order up to D, then height and width; of 16 bits or 32.

    Args:
        routes: A key of `vmamba.ops.routes.ROUTES`.
        d_state: N.
        dt_rank: R.
        flip_back: See `vmamba.ops.cross_merge`.
    """
    pattern = get_routes(routes)
    lines = [
        _preamble(len(pattern)),
        *(_order(k, route) for k, route in enumerate(pattern)),
        _read(len(pattern), d_state, dt_rank),
        _line_starts(pattern[0]) if pattern[0].per_line else "",
        _recur(len(pattern), d_state, pattern[0].per_line),
        _places(len(pattern), flip_back),
        *(_write(k, route, flip_back) for k, route in enumerate(pattern)),
    ]
    total = "skipped" if flip_back else "route_0"
    for k in range(0 if flip_back else 1, len(pattern)):
        lines.append(f"  sum_{k} = Add({total}, route_{k})")
        total = f"sum_{k}"
    body = "\n".join(lines)
    return f"""
{scan_name(routes, d_state, dt_rank, flip_back)} (
  x_in, projected_in, dt_weight_in, dt_bias, A, D, height, width
) => (y)
{{
{body}
  y = Reshape({total}, x_shape)
}}
"""


def _preamble(K: int) -> str:
    M = CHUNK_STEPS
    return f"""  x = Cast<to = 1>(x_in)
  projected = Cast<to = 1>(projected_in)
  dt_weight = Cast<to = 1>(dt_weight_in)
  zero = Constant<value_ints = [0]>()
  one = Constant<value_ints = [1]>()
  minus_one = Constant<value_ints = [-1]>()
  nought = Constant<value_int = 0>()
  unit = Constant<value_int = 1>()
  M = Constant<value_ints = [{M}]>()
  MM = Constant<value_ints = [{M * M}]>()
  K = Constant<value_ints = [{K}]>()
  H = Reshape(height, one)
  W = Reshape(width, one)
  HW = Concat<axis = 0>(H, W)
  WH = Concat<axis = 0>(W, H)
  L = Mul(H, W)
  L_last = Sub(L, one)
  Q_less = Div(L_last, MM)
  Q = Add(Q_less, one)
  MQ = Mul(M, Q)
  M2_less = Div(L_last, MQ)
  M2 = Add(M2_less, one)
  chunks = Mul(Q, M2)
  T = Mul(M, chunks)
  padding = Sub(T, L)
  L_scalar = Squeeze(L)
  numbers = Range(nought, L_scalar, unit)
  x_shape = Shape(x)
  batch = Shape<start = 0, end = 1>(x)
  E = Shape<start = 2, end = 3>(x)
  rows = Concat<axis = 0>(minus_one, E)
  one_row = Concat<axis = 0>(one, L)
  by_rows = Reshape(numbers, HW)
  by_columns = Reshape(numbers, WH)"""


def _flipped(name: str, given: str, per_line: bool) -> str:
    axes = "1" if per_line else "0, 1"
    back = "-1" if per_line else "-1, -1"
    to = ", ".join(["-9223372036854775807"] * len(axes.split(",")))
    return f"""  {name}_axes = Constant<value_ints = [{axes}]>()
  {name}_back = Constant<value_ints = [{back}]>()
  {name}_to = Constant<value_ints = [{to}]>()
  {name} = Slice({given}, {name}_back, {name}_to, {name}_axes, {name}_back)"""


def _order(k: int, route: Route) -> str:
    """Find the positions of the map that a route reads: order_k, [1, L]."""
    lines, name = [], "by_rows"
    if route.column_major:
        lines.append(f"  turned_{k} = Transpose<perm = [1, 0]>(by_rows)")
        name = f"turned_{k}"
    if route.reverse:
        lines.append(_flipped(f"read_{k}", name, route.per_line))
        name = f"read_{k}"
    return "\n".join([*lines, f"  order_{k} = Reshape({name}, one_row)"])


def _read(K: int, N: int, R: int) -> str:
    """Read x and the projections along all routes; give Δ, and Δ·x as drive."""
    orders = ", ".join(f"order_{k}" for k in range(K))
    return f"""  orders = Concat<axis = 0>({orders})
  pads = Concat<axis = 0>(zero, zero, zero, padding)
  padded = Pad<mode = "edge">(orders, pads)
  cut = Concat<axis = 0>(K, Q, M2, M)
  in_groups = Reshape(padded, cut)
  steps_first = Transpose<perm = [3, 0, 2, 1]>(in_groups)
  steps_shape = Concat<axis = 0>(M, K, M2, Q, one)
  of_image = Reshape(steps_first, steps_shape)
  batch_scalar = Squeeze(batch)
  images = Range(nought, batch_scalar, unit)
  first_of_image = Mul(images, L)
  index = Add(of_image, first_of_image)
  x_rows = Reshape(x, rows)
  x_read = Gather<axis = 0>(x_rows, index)
  part_width = Constant<value_ints = [-1, {R + 2 * N}]>()
  parts = Reshape(projected, part_width)
  ks = Constant<value_ints = [{", ".join(map(str, range(K)))}]>()
  ks_shape = Constant<value_ints = [{K}, 1, 1, 1]>()
  ks_apart = Reshape(ks, ks_shape)
  index_K = Mul(index, K)
  part_index = Add(index_K, ks_apart)
  parts_read = Gather<axis = 0>(parts, part_index)
  part_sizes = Constant<value_ints = [{R}, {N}, {N}]>()
  rank, B, C = Split<axis = -1>(parts_read, part_sizes)
  rank_shape = Constant<value_ints = [{CHUNK_STEPS}, {K}, -1, {R}]>()
  rank_rows = Reshape(rank, rank_shape)
  beside = Constant<value_ints = [0, 0, 0, 0, 0, 0, 0, 1]>()
  one_value = Constant<value_float = 1.0>()
  rank_one = Pad(rank_rows, beside, one_value)
  weight = Transpose<perm = [0, 2, 1]>(dt_weight)
  bias = Unsqueeze(dt_bias, one)
  weight_bias = Concat<axis = 1>(weight, bias)
  z = MatMul(rank_one, weight_bias)
  delta_rows = {DOMAIN}.Softplus(z)
  full = Concat<axis = 0>(M, K, M2, Q, batch, E)
  delta = Reshape(delta_rows, full)
  drive = Mul(delta, x_read)"""


def _line_starts(route: Route) -> str:
    """Mark with 0 the steps that begin a sequence of their own, with 1 the others: keep, [M, 1, M₂, Q, 1, 1]."""
    return f"""  T_scalar = Squeeze(T)
  steps = Range(nought, T_scalar, unit)
  in_line = Mod(steps, {"H" if route.column_major else "W"})
  kept = Cast<to = 9>(in_line)
  kept_value = Cast<to = 1>(kept)
  kept_cut = Concat<axis = 0>(Q, M2, M)
  kept_groups = Reshape(kept_value, kept_cut)
  kept_first = Transpose<perm = [2, 1, 0]>(kept_groups)
  keep_axes = Constant<value_ints = [1, 4, 5]>()
  keep = Unsqueeze(kept_first, keep_axes)"""


def _recur(K: int, N: int, per_line: bool) -> str:
    """Run the recurrence for each of the N states and add them up: y_routes [M, K, M₂, Q, B, E]."""
    steps = f"""{"whole_a" if per_line else "a"} = Exp(log_a)
      {"a = Mul(whole_a, keep)" if per_line else ""}
      b = Mul(drive, B_n)"""
    if N == 1:
        return f"""  A_shape = Constant<value_ints = [{K}, 1, 1, 1, -1]>()
  A_row = Reshape(A, A_shape)
  log_a = Mul(delta, A_row)
  B_n = Identity(B)
  {steps}
  y_routes = {DOMAIN}.Recurrence(a, b, C)"""
    return f"""  A_first = Transpose<perm = [2, 0, 1]>(A)
  A_shape = Constant<value_ints = [{N}, {K}, 1, 1, 1, -1]>()
  A_rows = Reshape(A_first, A_shape)
  nothing = ConstantOfShape<value = float[1] {{0.0}}>(full)
  y_routes = Scan<num_scan_inputs = 3, scan_input_axes = [0, 5, 5],
    body = states (float[] so_far, float[] A_n, float[] B_flat, float[] C_flat) => (float[] more) {{
      B_n = Unsqueeze(B_flat, minus_one)
      C_n = Unsqueeze(C_flat, minus_one)
      log_a = Mul(delta, A_n)
      {steps}
      part = {DOMAIN}.Recurrence(a, b, C_n)
      more = Add(so_far, part)
    }}>(nothing, A_rows, B, C)"""


def _places(K: int, flip_back: bool) -> str:
    """Find in which row of [M, K, M₂, Q] each step t lies for the first route: place, [T]; begin to merge with D·x.

    D·x is added on the map, once for all routes, unless some of it is put back elsewhere than it was read.
    """
    if flip_back:
        skip = """  D_sum = ReduceSum<keepdims = 0>(D, zero)
  skipped = Mul(x, D_sum)
  y_rows = Reshape(y_routes, rows)"""
    else:
        skip = f"""  D_shape = Constant<value_ints = [{K}, 1, 1, 1, -1]>()
  D_row = Reshape(D, D_shape)
  skipped = Mul(x_read, D_row)
  with_skipped = Add(y_routes, skipped)
  y_rows = Reshape(with_skipped, rows)"""
    return f"""  chunks_K = Mul(chunks, K)
  m = Constant<value_ints = [{", ".join(map(str, range(CHUNK_STEPS)))}]>()
  m_place = Mul(m, chunks_K)
  M2_scalar = Squeeze(M2)
  m2 = Range(nought, M2_scalar, unit)
  m2_place = Mul(m2, Q)
  m2_column = Unsqueeze(m2_place, one)
  Q_scalar = Squeeze(Q)
  q = Range(nought, Q_scalar, unit)
  q_axes = Constant<value_ints = [1, 2]>()
  q_column = Unsqueeze(q, q_axes)
  q_m2 = Add(q_column, m2_column)
  q_m2_m = Add(q_m2, m_place)
  place = Reshape(q_m2_m, minus_one)
  image_column = Unsqueeze(images, one)
{skip}"""


def _write(k: int, route: Route, flip_back: bool) -> str:
    """Put a route back on the map: route_k, [B, L, E]. As published, unturned lines lie in the order they were read."""
    lines, name = [], "by_columns" if route.column_major else "by_rows"
    if route.reverse and flip_back:
        lines.append(_flipped(f"back_{k}", name, route.per_line))
        name = f"back_{k}"
    if route.column_major:
        lines.append(f"  upright_{k} = Transpose<perm = [1, 0]>({name})")
        name = f"upright_{k}"
    return "\n".join(
        [
            *lines,
            f"  step_{k} = Reshape({name}, one_row)",
            f"  place_{k} = Gather<axis = 0>(place, step_{k})",
            f"  k_{k} = Constant<value_ints = [{k}]>()",
            f"  skip_{k} = Mul(k_{k}, chunks)",
            f"  row_{k} = Add(place_{k}, skip_{k})",
            f"  image_row_{k} = Mul(row_{k}, batch)",
            f"  at_{k} = Add(image_row_{k}, image_column)",
            f"  route_{k} = Gather<axis = 0>(y_rows, at_{k})",
        ]
    )


def functions(scans: Sequence[tuple[str, int, int, bool]]) -> list[str]:
    """Write all the functions that scans need, each in ONNX's textual syntax.

    Args:
        scans: The arguments of `scan`, for each kind of scan in a model.
    """
    header = f'<opset_import: ["" : {OPSET}, "{DOMAIN}" : 1], domain: "{DOMAIN}">'
    return [header + text for text in (_SOFTPLUS, _RECURRENCE, *(scan(*kind) for kind in scans))]
