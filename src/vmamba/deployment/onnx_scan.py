"""SS2D's core in ONNX operators: functions of the domain "vmamba" that any runtime of the standard operators can run.

The recurrence runs on three levels. A line of the map (a row or a column, whichever the route follows) is cut into q
chunks of m ≤ 8 steps. An ONNX `Scan` over the m steps, all chunks of all lines at once, finds the state in which each
chunk would end had it started from zero; `Scan`s over the chunks of a line and over the lines turn these into the
states in which the chunks really start; a last `Scan` over the m steps runs the recurrence from there. A map of H×W
positions takes 16 large steps, about W/4 middle ones and H small ones, in place of H·W, and each large one is long
enough for threads to share. Every step is `a·h + b` as in the recurrence itself: nothing is divided and no exponential
is taken but that of Δ·A, so nothing overflows that the recurrence would not.

Layout inside: [m, q, G, B, E] for G lines and B images, so that slicing along the steps copies nothing. A route that
reads backwards is a `Scan` that runs backwards. All sizes but N, R and the routes are dynamic.
"""

from collections.abc import Sequence

from vmamba.ops.routes import Route, get_routes

DOMAIN = "vmamba"
OPSET = 20
CHUNK_STEPS = 8

# log1p(e) for e = exp(-|z|), as log(u) + (e - (u - 1)) with u = 1 + e: what rounding takes from u is added back, so
# that small Δ keep their digits. onnxruntime's own Softplus takes one number at a time, and four times as long.
_SOFTPLUS = """
Softplus (z) => (y)
{
  one = Constant<value_float = 1.0>()
  size = Abs(z)
  exponent = Neg(size)
  e = Exp(exponent)
  u = Add(e, one)
  log_u = Log(u)
  kept = Sub(u, one)
  lost = Sub(e, kept)
  log1p = Add(log_u, lost)
  positive = Relu(z)
  y = Add(positive, log1p)
}
"""

_STEP = "float[] h, float[] a, float[] b) => (float[] next"


def recurrence(reverse: bool, per_line: bool) -> str:
    """Write the function that runs h_t = a_t h_{t-1} + b_t along the map and gives c_t h_t.

    Inputs: a, b and log_a = log(a), [m, q, G, B, E]; c, [m, q, G, B, 1]. Output: [m, q, G, B, E].

    Args:
        reverse: Whether the route runs backwards.
        per_line: Whether each line is a sequence of its own.
    """
    d = int(reverse)
    ends = f"Scan<num_scan_inputs = 2, scan_input_directions = [{d}, {d}], body = ends"
    starts = (
        f"Scan<num_scan_inputs = 2, scan_input_directions = [{d}, {d}], scan_output_directions = [{d}], body = starts"
    )
    state_step = f"({_STEP}, float[] start) {{ start = Identity(h) ah = Mul(a, h) next = Add(ah, b) }}"
    step = "ah = Mul(a, h) next = Add(ah, b)"
    between = f"""
  line_log_a = ReduceSum<keepdims = 0>(chunk_log_a, zero)
  line_a = Exp(line_log_a)
  line_ends = {ends} ({_STEP}) {{ {step} }}>(zero_lines, chunk_a, chunk_ends)
  map_end, line_starts = {starts} {state_step}>(zero_map, line_a, line_ends)"""
    return f"""
{_recurrence_name(reverse, per_line)} (a, log_a, b, c) => (y)
{{
  zero = Constant<value_ints = [0]>()
  chunks_shape = Shape<start = 1>(a)
  zero_chunks = ConstantOfShape<value = float[1] {{0.0}}>(chunks_shape)
  lines_shape = Shape<start = 2>(a)
  zero_lines = ConstantOfShape<value = float[1] {{0.0}}>(lines_shape)
  map_shape = Shape<start = 3>(a)
  zero_map = ConstantOfShape<value = float[1] {{0.0}}>(map_shape)
  chunk_log_a = ReduceSum<keepdims = 0>(log_a, zero)
  chunk_a = Exp(chunk_log_a)
  chunk_ends = {ends} ({_STEP}) {{ {step} }}>(zero_chunks, a, b){
        " line_starts = Identity(zero_lines)" if per_line else between
    }
  line_end, chunk_starts = {starts} ({_STEP}, float[] start) {{ start = Identity(h) {
        step
    } }}>(line_starts, chunk_a, chunk_ends)
  chunk_end, y = Scan<num_scan_inputs = 3, scan_input_directions = [{d}, {d}, {d}], scan_output_directions = [{d}],
    body = outputs (float[] h, float[] a, float[] b, float[] c) => (float[] next, float[] ch) {{ {
        step
    } ch = Mul(next, c) }}>(chunk_starts, a, b, c)
}}
"""


def _recurrence_name(reverse: bool, per_line: bool) -> str:
    return f"{'Lines' if per_line else 'Map'}{'Backward' if reverse else 'Forward'}"


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
    lines = [_preamble(pattern, d_state, dt_rank)]
    maps = []
    for column_major in (False, True):
        ks = [k for k, route in enumerate(pattern) if route.column_major == column_major]
        if not ks:
            continue
        prefix = "column" if column_major else "row"
        lines.append(_read(prefix, column_major, len(pattern)))
        lines += [_route(k, prefix, pattern[k], d_state) for k in ks]
        # Lines that are not turned back cannot be added before they are on the map.
        groups = [ks] if flip_back else [[k] for k in ks]
        if not flip_back:
            lines += [_skip(k, prefix) for k in ks]
        for group in groups:
            turned = not flip_back and pattern[group[0]].reverse
            maps.append(f"map_{group[0]}")
            lines.append(_write(prefix, column_major, group, flip_back, turned))
    # D·x is added on the map, once for all routes, unless some of it is put back elsewhere than it was read.
    total, *others = ["skipped", *maps] if flip_back else maps
    for i, other in enumerate(others):
        lines.append(f"  sum_{i} = Add({total}, {other})")
        total = f"sum_{i}"
    name = scan_name(routes, d_state, dt_rank, flip_back)
    body = "\n".join(lines)
    return f"""
{name} (x_in, projected_in, dt_weight_in, dt_bias, A, D, height, width) => (y)
{{
{body}
  flat = Concat<axis = 0>(batch, minus_one, E)
  y = Reshape({total}, flat)
}}
"""


def _preamble(pattern: Sequence[Route], N: int, R: int) -> str:
    sizes = ", ".join([f"{R}, {N}, {N}"] * len(pattern) + ["1"])
    return f"""  x = Cast<to = 1>(x_in)
  projected = Cast<to = 1>(projected_in)
  dt_weight = Cast<to = 1>(dt_weight_in)
  zero = Constant<value_ints = [0]>()
  one = Constant<value_ints = [1]>()
  two = Constant<value_ints = [2]>()
  three = Constant<value_ints = [3]>()
  minus_one = Constant<value_ints = [-1]>()
  longest = Constant<value_ints = [{CHUNK_STEPS}]>()
  padded_value = Constant<value_float = 1.0>()
  hidden = Constant<value_floats = [-1e30]>()
  N = Constant<value_ints = [{N}]>()
  R1 = Constant<value_ints = [{R + 1}]>()
  part_sizes = Constant<value_ints = [{sizes}]>()
  batch = Shape<start = 0, end = 1>(x)
  E = Shape<start = 2, end = 3>(x)
  H = Reshape(height, one)
  W = Reshape(width, one)
  grid = Concat<axis = 0>(batch, H, W, minus_one)
  x_map = Reshape(x, grid)
  one_map_shape = Concat<axis = 0>(batch, H, W, one)
  unpadded = ConstantOfShape<value = float[1] {{0.0}}>(one_map_shape)
  p_grid = Reshape(projected, grid)
  p_map = Concat<axis = -1>(p_grid, unpadded)
  D_sum = ReduceSum<keepdims = 0>(D, zero)
  skipped = Mul(x_map, D_sum)
  hidden_shape = Concat<axis = 0>(one, E)
  hidden_row = Expand(hidden, hidden_shape)"""


def _read(prefix: str, column_major: bool, routes: int) -> str:
    """Bring x and the projections into the order [m, q, G, B, ·] of the rows or columns, padded to whole chunks.

    Padding is marked by a 1 beside the rank of Δ, which a weight of -1e30 turns into Δ = 0: the state passes unchanged.
    """
    steps, lines = ("H", "W") if column_major else ("W", "H")
    pads = (
        "zero, zero, zero, zero, zero, {0}, zero, zero"
        if column_major
        else "zero, zero, zero, zero, zero, zero, {0}, zero"
    )
    cut = "batch, {0}_q, {0}_m, W" if column_major else "batch, H, {0}_q, {0}_m"
    order = "2, 1, 3, 0, 4" if column_major else "3, 2, 1, 0, 4"
    parts = ", ".join(f"{prefix}_r{k}, {prefix}_B{k}, {prefix}_C{k}" for k in range(routes))
    p = prefix
    return f"""  {p}_more = Add({steps}, longest)
  {p}_last = Sub({p}_more, one)
  {p}_q = Div({p}_last, longest)
  {p}_up = Add({steps}, {p}_q)
  {p}_up1 = Sub({p}_up, one)
  {p}_m = Div({p}_up1, {p}_q)
  {p}_length = Mul({p}_m, {p}_q)
  {p}_padding = Sub({p}_length, {steps})
  {p}_pads = Concat<axis = 0>({pads.format(f"{p}_padding")})
  {p}_cut = Concat<axis = 0>({cut.format(p)}, minus_one)
  {p}_full = Concat<axis = 0>({p}_m, {p}_q, {lines}, batch, E)
  {p}_x_padded = Pad({p}_source_x, {p}_pads)
  {p}_x_cut = Reshape({p}_x_padded, {p}_cut)
  {p}_x = Transpose<perm = [{order}]>({p}_x_cut)
  {p}_p_padded = Pad({p}_source_p, {p}_pads, padded_value)
  {p}_p_cut = Reshape({p}_p_padded, {p}_cut)
  {p}_p = Transpose<perm = [{order}]>({p}_p_cut)
  {parts}, {p}_mark = Split<axis = -1>({p}_p, part_sizes)""".replace(f"{p}_source_x", "x_map").replace(
        f"{p}_source_p", "p_map"
    )


def _route(k: int, prefix: str, route: Route, N: int) -> str:
    """Compute one route: y_k [m, q, G, B, E]."""
    recurrence_of = _recurrence_name(route.reverse, route.per_line)
    head = f"""  k_{k} = Constant<value_int = {k}>()
  W_{k} = Gather<axis = 0>(dt_weight, k_{k})
  W_t_{k} = Transpose<perm = [1, 0]>(W_{k})
  W_marked_{k} = Concat<axis = 0>(W_t_{k}, hidden_row)
  bias_{k} = Gather<axis = 0>(dt_bias, k_{k})
  A_{k} = Gather<axis = 0>(A, k_{k})
  A_t_{k} = Transpose<perm = [1, 0]>(A_{k})
  r_marked_{k} = Concat<axis = -1>({prefix}_r{k}, {prefix}_mark)
  r_shape_{k} = Concat<axis = 0>(minus_one, R1)
  r_{k} = Reshape(r_marked_{k}, r_shape_{k})
  z_{k} = Gemm(r_{k}, W_marked_{k}, bias_{k})
  delta_flat_{k} = {DOMAIN}.Softplus(z_{k})
  delta_{k} = Reshape(delta_flat_{k}, {prefix}_full)
  drive_{k} = Mul(delta_{k}, {prefix}_x)"""
    if N == 1:
        return f"""{head}
  A_row_{k} = Squeeze(A_t_{k}, zero)
  log_a_{k} = Mul(delta_{k}, A_row_{k})
  a_{k} = Exp(log_a_{k})
  b_{k} = Mul(drive_{k}, {prefix}_B{k})
  y_{k} = {DOMAIN}.{recurrence_of}(a_{k}, log_a_{k}, b_{k}, {prefix}_C{k})"""
    return f"""{head}
  nothing_{k} = ConstantOfShape<value = float[1] {{0.0}}>({prefix}_full)
  y_{k} = Scan<num_scan_inputs = 3, scan_input_axes = [0, 4, 4],
    body = states_{k} (float[] so_far, float[] A_n, float[] B_flat, float[] C_flat) => (float[] more) {{
      B_n = Unsqueeze(B_flat, minus_one)
      C_n = Unsqueeze(C_flat, minus_one)
      log_a = Mul(delta_{k}, A_n)
      a = Exp(log_a)
      b = Mul(drive_{k}, B_n)
      part = {DOMAIN}.{recurrence_of}(a, log_a, b, C_n)
      more = Add(so_far, part)
    }}>(nothing_{k}, A_t_{k}, {prefix}_B{k}, {prefix}_C{k})"""


def _skip(k: int, prefix: str) -> str:
    """Add D·x to one route, in its order."""
    return f"""  D_{k} = Gather<axis = 0>(D, k_{k})
  skipped_{k} = Mul({prefix}_x, D_{k})
  with_D_{k} = Add(y_{k}, skipped_{k})"""


def _write(prefix: str, column_major: bool, ks: Sequence[int], merged: bool, turned: bool) -> str:
    """Add routes up and put them back on the map: map_k [B, H, W, E] for the first of them."""
    order = "3, 1, 0, 2, 4" if column_major else "3, 2, 1, 0, 4"
    shape = f"batch, {prefix}_length, W" if column_major else f"batch, H, {prefix}_length"
    steps, axis = ("H", "one") if column_major else ("W", "two")
    first = ks[0]
    lines, total = [], f"{'y' if merged else 'with_D'}_{first}"
    for k in ks[1:]:
        lines.append(f"  added_{k} = Add({total}, y_{k})")
        total = f"added_{k}"
    lines.append(f"""  cut_{first} = Transpose<perm = [{order}]>({total})
  padded_shape_{first} = Concat<axis = 0>({shape}, E)
  padded_{first} = Reshape(cut_{first}, padded_shape_{first})""")
    whole = f"padded_{first}, zero, {steps}, {axis}"
    if not turned:
        return "\n".join([*lines, f"  map_{first} = Slice({whole})"])
    # As published: reversed lines are added in the order they were read.
    return "\n".join(
        [
            *lines,
            f"  straight_{first} = Slice({whole})",
            f"  before_{first} = Sub(minus_one, {steps})",
            f"  map_{first} = Slice(straight_{first}, minus_one, before_{first}, {axis}, minus_one)",
        ]
    )


def functions(scans: Sequence[tuple[str, int, int, bool]]) -> list[str]:
    """Write all the functions that scans need, each in ONNX's textual syntax.

    Args:
        scans: The arguments of `scan`, for each kind of scan in a model.
    """
    routes = {(route.reverse, route.per_line) for name, *_ in scans for route in get_routes(name)}
    texts = [_SOFTPLUS, *(recurrence(*kind) for kind in sorted(routes)), *(scan(*kind) for kind in scans)]
    header = f'<opset_import: ["" : {OPSET}, "{DOMAIN}" : 1], domain: "{DOMAIN}">'
    return [header + text for text in texts]
