"""The text of the kernel that adds tokens to a layer's states, put together for a layer's kind.

A threadgroup has one job for one sequence: to pool a compressor's row, to make the window row, to norm a token's query
latent, or to copy a piece of a tail. In the first two a thread has a pair of channels.
"""

from functools import lru_cache

from ds4mlx.custom_kernels.dialect import Kernel
from ds4mlx.custom_kernels.layer.buffers import numbered, picked, variant
from ds4mlx.custom_kernels.layer.row_packing import INDEX, KV, PAIR, SPREAD

WORDS = 4  # that a thread copies

COMMON = """
inline float total(float v, threadgroup float* parts, uint at, uint threads) {
  v = simd_sum(v);
  if (at % 32 == 0) parts[at / 32] = v;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(at % 32 < threads / 32 ? parts[at % 32] : 0.0f);
}

// All words but those of the row [begin, end).
inline void copy(const device uint* from, device uint* to, uint words, uint begin, uint end,
                 uint at, uint threads) {
  uint w[4] = {0};
  #pragma unroll
  for (uint i = 0; i < 4; i++) if (at + i * threads < words) w[i] = from[at + i * threads];
  #pragma unroll
  for (uint i = 0; i < 4; i++) {
    uint e = at + i * threads;
    if (e < words && (e < begin || e >= end)) to[e] = w[i];
  }
}

// The thread's pair of a row in threadgroup memory, normed and turned.
template <typename T, typename W>
inline void turned(const threadgroup float* row, const device W* weight, const device float* angles,
                   int width, int rope, float eps, threadgroup float* parts, uint at, uint threads,
                   thread float* v) {
  bool has = 2 * at < uint(width);
  v[0] = has ? row[2 * at] : 0.0f;
  v[1] = has ? row[2 * at + 1] : 0.0f;
  float sum = total(fma(v[0], v[0], v[1] * v[1]), parts, at, threads);
  if (!has) return;
  float r = 1.0f / sqrt(sum / float(width) + eps);
  v[0] = as<T>(v[0] * r * float(weight[2 * at]));
  v[1] = as<T>(v[1] * r * float(weight[2 * at + 1]));
  int i = int(at) - (width - rope) / 2;
  if (i < 0) return;
  float c = angles[i], s = angles[rope / 2 + i], a = v[0];
  v[0] = as<T>(a * c - v[1] * s);
  v[1] = as<T>(a * s + v[1] * c);
}
"""

POOL = """
inline void load4(const device float* p, thread float* v) {
  float4 q = *(const device float4*)p;
  v[0] = q.x; v[1] = q.y; v[2] = q.z; v[3] = q.w;
}
// A token's projection to its place: values, and scores with the bias of its place in the group.
template <typename A>
inline void project(const device float* values, const device float* scores, const device A* bias,
                    device float* out, uint channels, uint at, uint threads) {
  for (uint c = at; c < channels; c += threads) {
    out[c] = values[c];
    out[channels + c] = scores[c] + float(bias[c]);
  }
}
// The pooled row, in threadgroup memory: eight slices of the candidates in the lanes of a SIMD-group.
template <typename T, int WIDTH, int COUNT, typename A>
inline void pool(const device float* values, const device float* scores, const device A* bias,
                 const device float* old, const device float* recent, int keep, int p, int settled,
                 threadgroup float* row, uint at, uint threads) {
  constexpr int CHANNELS = COUNT == 8 ? 2 * WIDTH : WIDTH, MANY = COUNT == 8 ? 1 : 4;
  int slice = at % 32 / 4;
  for (int c = at / 32 * 16 + at % 4 * 4; c < WIDTH; c += threads / 2) {
    float most[4], sum[4] = {0}, pooled[4] = {0};
    for (int j = 0; j < 4; j++) most[j] = -3e38f;
    #pragma unroll 1
    for (int k0 = 0; k0 < COUNT; k0 += 8 * MANY) {
      float v[MANY][4], s[MANY][4];
      #pragma unroll
      for (int i = 0; i < MANY; i++) {
        int k = k0 + 8 * i + slice, q = p + 1 - COUNT + k;
        int e = COUNT == 8 && k >= 4 ? WIDTH + c : c;
        const device float* from = q < settled ? old + (q - settled + keep) * (2 * CHANNELS)
                                               : recent + (q - settled) * (2 * CHANNELS);
        for (int j = 0; j < 4; j++) { v[i][j] = 0; s[i][j] = -INFINITY; }
        if (q == p) {
          load4(values + e, v[i]);
          load4(scores + e, s[i]);
          for (int j = 0; j < 4; j++) s[i][j] += float(bias[e + j]);
        } else if (q >= 0) {
          load4(from + e, v[i]);
          load4(from + CHANNELS + e, s[i]);
        }
      }
      #pragma unroll
      for (int j = 0; j < 4; j++) {
        float top = most[j];
        for (int i = 0; i < MANY; i++) top = max(top, s[i][j]);
        float f = exp(most[j] - top);
        sum[j] *= f;
        pooled[j] *= f;
        most[j] = top;
        for (int i = 0; i < MANY; i++) {
          float w = exp(s[i][j] - top);
          sum[j] += w;
          pooled[j] = fma(w, v[i][j], pooled[j]);
        }
      }
    }
    #pragma unroll
    for (int j = 0; j < 4; j++) {
      float top = most[j];
      for (ushort i = 4; i < 32; i *= 2) top = max(top, simd_shuffle_xor(top, i));
      float f = exp(most[j] - top);
      sum[j] *= f;
      pooled[j] *= f;
      for (ushort i = 4; i < 32; i *= 2) {
        sum[j] += simd_shuffle_xor(sum[j], i);
        pooled[j] += simd_shuffle_xor(pooled[j], i);
      }
      if (slice == 0) row[c + j] = as<T>(pooled[j] / sum[j]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
"""

BEGIN = """
    threadgroup float row[MOST];
    threadgroup float parts[32];
    const uint threads = 32 * GROUPS;
    uint at = thread_index_in_threadgroup, job = threadgroup_position_in_grid.x;
    uint sequence = threadgroup_position_in_grid.y;
    uint state = FIRST + sequence;
    const device int* place = places + 8 * (state < uint(places_shape[0]) ? state : FIRST);
    int p = place[0], settled = place[1], slot = p - settled;
    float eps = as_type<float>(EPS), v[2];
    const device float* own = products + uint(place[4]) * ALL;
    const device float* turns = angles + uint(place[4]) * (4 * ROPE);
"""

# Rows lie as floats in the tails of projections; other rows are words, or numbers of the activations' type.
TAIL = """
    const device {type}* {name} = (const device {type}*)(tails + {begin});
    device {type}* new_{name} = (device {type}*)(new_tails + {begin});
"""

POOLING = """
    bool full = (p + 1) % RATIO == 0;
    uint next = p / RATIO - place[RATIO == 4 ? 2 : 3];
    const device float* turn = turns + (RATIO == 4 ? 2 : 3) * ROPE;
"""

POOL_JOB = """
    if (job == {i}) {{
        constexpr int C = RATIO == 4 ? 2 * WIDTH{i} : WIDTH{i};
        project(own + VALUES_AT{i}, own + SCORES_AT{i}, ape{i} + p % RATIO * C, new_recent{i} + slot * 2 * C, C, at, threads);
        if (!full) return;
        pool<T, WIDTH{i}, RATIO == 4 ? 8 : RATIO>(
            own + VALUES_AT{i}, own + SCORES_AT{i}, ape{i} + p % RATIO * C, {old}, recent{i}, KEEP{i}, p, settled,
            row, at, threads);
        turned<T>(row, norm{i}, turn, WIDTH{i}, ROPE, eps, parts, at, threads, v);
        {spread}
        {pack}
        return;
    }}
"""

WINDOW_JOB = """
    if (job == {i}) {{
        for (uint c = at; c < WIDTH; c += threads) row[c] = as<T>(own[KV_AT + c]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        turned<T>(row, kv_norm, turns + ANGLES * ROPE, WIDTH, ROPE, eps, parts, at, threads, v);
        {pack}
        return;
    }}
    job -= {i} + 1;
"""

# Of every token of the step, since all are multiplied by one matrix next.
LATENT_JOB = """
    uint tokens = uint(products_shape[0]);
    if (job < tokens) {
        if (sequence > 0) return;
        const device float* latent = products + job * ALL + LATENT_AT;
        float sum = 0;
        for (uint c = at; c < RANK; c += threads) {
            float a = as<T>(latent[c]);
            sum = fma(a, a, sum);
        }
        float r = 1.0f / sqrt(total(sum, parts, at, threads) / float(RANK) + eps);
        for (uint c = at; c < RANK; c += threads)
            latents[job * RANK + c] = static_cast<T>(as<T>(latent[c]) * r * float(q_norm[c]));
        return;
    }
    job -= tokens;
"""

COPY_JOB = """
    if (job < {pieces}) {{
        uint words = {words}, begin = {begin};
        copy((const device uint*){old}, (device uint*){new}, {room}, begin, begin + words,
             job * 4 * threads + at, threads);
        return;
    }}
    job -= {pieces};
"""

NO_ROW = "0xffffffffu"  # begins behind all words

OLD = ("kv_old", "index_old")  # projections before the tails, of each compressor

Kinds = tuple[tuple[str, bool], ...]


@lru_cache
def kernel(ratio: int, kind: str, poolings: Kinds, latents: bool, many: int) -> Kernel:
    """The kernel of layers of a ratio, KV rows of a kind, and compressors (kind, whether spread).

    latents: whether it makes the query latents too; many: sequences that it is written for.
    """
    count = len(poolings)
    inputs = ["products", "places", "angles", "kv_norm", "q_norm"]
    inputs += [f"{name}{i}" for name in ("ape", "norm") for i in range(count)]
    inputs += numbered(["tails", *OLD[:count]], many)
    outputs = ["latents"] * latents + numbered(["new_tails"], many)
    header = PAIR + COMMON + (POOL if ratio else "")
    kinds = {kind, *(each for each, _ in poolings)}
    header += (KV if "kv" in kinds else "") + (INDEX if "index" in kinds else "")
    header += SPREAD if any(spread for _, spread in poolings) else ""
    name = "_".join(["rows", str(ratio), kind, *(k + "_spread" * s for k, s in poolings)])
    name = variant(name + "_alone" * (not latents), many)
    return Kernel(name, inputs, outputs, _body(ratio, kind, poolings, latents, many), header)


def _body(ratio: int, kind: str, poolings: Kinds, latents: bool, many: int) -> str:
    """The jobs in the order of their threadgroups: those that take longest come first."""
    jobs = [BEGIN, _lying(kind, poolings, many), POOLING if ratio else ""]
    for i, (each, spread) in enumerate(poolings):
        packed = _pack(each, f"new_rows{i}", "next", f"WIDTH{i}", f"ROW_WORDS{i}")
        spreads = f"spread<T>(v, WIDTH{i}, row, at);" if spread else ""
        jobs.append(POOL_JOB.format(i=i, old=OLD[i], spread=spreads, pack=packed))
    packed = _pack(kind, "new_window", "slot", "WIDTH", "WINDOW_WORDS")
    jobs += [WINDOW_JOB.format(i=len(poolings), pack=packed), LATENT_JOB if latents else ""]
    jobs.append(_copy("window", "WINDOW_ROOM", "WINDOW_WORDS", "uint(slot) * words"))
    for i in range(len(poolings)):
        jobs.append(
            _copy(f"recent{i}", f"RECENT_ROOM{i}", f"RECENT_WORDS{i}", "uint(slot) * words")
        )
        begin = f"full ? next * words : {NO_ROW}"
        jobs.append(_copy(f"rows{i}", f"ROWS_ROOM{i}", f"ROW_WORDS{i}", begin))
    return "".join(jobs)


def _lying(kind: str, poolings: Kinds, many: int) -> str:
    """Statements that name what the sequence's arrays hold."""
    text = picked(["tails"], "uint", many, "sequence")
    text += picked(["new_tails"], "uint", many, "sequence", kind="")
    text += picked(OLD[: len(poolings)], "float", many, "sequence") if poolings else ""
    text += TAIL.format(type=_type(kind), name="window", begin="WINDOW_AT")
    for i, (each, _) in enumerate(poolings):
        text += TAIL.format(type="float", name=f"recent{i}", begin=f"RECENT_AT{i}")
        text += TAIL.format(type=_type(each), name=f"rows{i}", begin=f"ROWS_AT{i}")
    return text


def _type(kind: str) -> str:
    """Of what rows of a kind are made."""
    return "T" if kind == "plain" else "uint"


def _pack(kind: str, out: str, index: str, width: str, words: str) -> str:
    """The statement that puts the thread's pair into row `index` of `out`."""
    if kind == "plain":
        return f"if (2 * at < {width}) put_pair({out} + {index} * {width} + 2 * at, v);"
    sizes = f"{width}, CODED, HEAD" if kind == "kv" else width
    function = "pack_kv<T>" if kind == "kv" else "pack_index"
    return f"{function}(v, {out} + {index} * {words}, {sizes}, at);"


def _copy(old: str, room: str, words: str, begin: str) -> str:
    """The job that copies all words of a tail but for those of a row, that which begins at `begin`."""
    pieces = f"({room} + 4 * threads - 1) / (4 * threads)"
    return COPY_JOB.format(
        pieces=pieces, words=words, begin=begin, old=old, new=f"new_{old}", room=room
    )
