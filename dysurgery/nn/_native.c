/* Convolutions with a kernel for each sample, mixed as they are needed: see native.py.
 *
 * Plain C with the vectors of GCC and clang, and of Python the stable interface only; of torch it knows what Python does.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define PANEL 576   /* rows of a panel: those of 8 samples stay in a cache of 1 MiB */
#define RUN 64      /* columns of the bank that are gathered at a time */
#define MAX_ROWS 64 /* rows of the bank that are fetched ahead */
#define SAMPLES 8   /* mixed together from one pass over the bank */
#define COLUMNS 288 /* weights of an output channel whose gradients are computed together, about */
#define PATCHES (256 << 10) /* floats of the patches of all samples, at most; else of BAND positions */
#define BAND 128 /* positions of a band */
#define PACKED (1 << 20)    /* floats of gradients in y that are packed at a time */
#define POOLED (256 << 10)  /* floats of x that are pooled before they are convolved, about */
#define WEIGHTS (256 << 10) /* floats of the gradients of mixed kernels that are kept from band to band */

struct conv {
    int B, K, H, W, Cin, Ho, Wo, Cout, kh, kw, sh, sw, ph, pw, dh, dw, groups;
};

/* What is done to y while it is in registers: an activation, and its mean over the positions, (B, Cout), or NULL. Within a
 * block of channels `sums` are those of one sample that are being added up. */
enum { RELU = 1, RELU6, HARDSWISH, SILU };
struct after {
    int activation;
    float *sums;
};

/* Outputs `at` .. at + n, as one vector, or as two of which the second begins `second` behind the first. */
struct block {
    int at, n, second;
};

/* Positions in rows and columns, where they are in x (in positions) and in y (in floats, from `y` on), and their taps:
 * `off` in x, `which` of the kernel; or `winograd`, see _winograd.h. */
struct grid {
    int rows, columns, taps;
    const int *off, *which;
    int winograd;
    ptrdiff_t y, x_row, x_column, y_row, y_column;
};

/* Buffers that are kept from call to call, as a fresh one costs a page fault for each 4 KiB. */
static struct {
    float *at;
    size_t floats;
    int taken;
} kept[8];

#define KEPT (sizeof kept / sizeof *kept)
#define KEEP ((size_t)4 << 20) /* floats of a buffer that is kept, at most */

static float *fresh(size_t floats) { return aligned_alloc(64, (floats * sizeof(float) + 127) / 64 * 64); }

static float *room(size_t floats)
{
    for (int grow = 0; grow < 2 && floats <= KEEP; grow++)
        for (size_t i = 0; i < KEPT; i++) {
            if (__atomic_exchange_n(&kept[i].taken, 1, __ATOMIC_ACQUIRE)) continue;
            if (grow && kept[i].floats < floats) {
                free(kept[i].at);
                kept[i].at = fresh(floats);
                kept[i].floats = kept[i].at ? floats : 0;
            }
            if (kept[i].at && kept[i].floats >= floats) return kept[i].at;
            __atomic_store_n(&kept[i].taken, 0, __ATOMIC_RELEASE);
        }
    return fresh(floats);
}

static void leave(float *buffer)
{
    for (size_t i = 0; buffer && i < KEPT; i++)
        if (kept[i].at == buffer) {
            __atomic_store_n(&kept[i].taken, 0, __ATOMIC_RELEASE);
            return;
        }
    free(buffer);
}

struct border {
    int top, bottom, left, right;
};

/* Maps (B, H, W, C) with a border of zeros, as (B, block of channels, H, W, channel): positions that lie a power of two
 * apart evict one another. x itself where there is neither a border nor a second block. */
struct padded {
    const float *x;
    float *copy;
    size_t sample, positions;
    int block;
};

static int pad(struct padded *a, const float *x, int B, int H, int W, int C, struct border d, int block, int threads)
{
    int rows = H + d.top + d.bottom, width = W + d.left + d.right;
    size_t positions = (size_t)rows * width;
    *a = (struct padded){x, NULL, positions * C, positions, block};
    if (!(d.top || d.bottom || d.left || d.right || C > block)) return 1;
    float *copy = a->copy = room(a->sample * B);
    if (!copy) return 0;
    a->x = copy;
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < B * rows; i++) {
        int b = i / rows, r = i % rows;
        const float *from = x + ((size_t)b * H + r - d.top) * W * C;
        for (int c = 0; c < C; c += block) {
            size_t cn = C - c < block ? C - c : block, size = sizeof(float) * cn;
            float *to = copy + b * positions * C + c * positions + (size_t)r * width * cn;
            if (r < d.top || r >= d.top + H) {
                memset(to, 0, size * width);
                continue;
            }
            memset(to, 0, size * d.left);
            to += cn * d.left;
            if (block >= C) memcpy(to, from, size * W);
            else for (int q = 0; q < W; q++) memcpy(to + q * cn, from + (size_t)q * C + c, size);
            memset(to + cn * W, 0, size * d.right);
        }
    }
    return 1;
}

/* Rows of zeros before the first one of gy that a tap reaches. */
static int before(int reach, int stride) { return reach > 0 ? (reach + stride - 1) / stride : 0; }

/* Samples of a chunk: as many as are mixed together, fewer if threads would be idle or few blocks be shared unevenly. */
static int share(int B, int together, int blocks, int threads)
{
    int parts = blocks % threads && blocks < 4 * threads ? threads : 1, chunk = (B + parts - 1) / parts;
    return chunk < together ? (chunk < 1 ? 1 : chunk) : together;
}

#define SET(set) {#set, forward_##set, input_gradient_##set, weight_gradients_##set, pool_##set, linear_##set}

#if defined(__x86_64__)
#ifdef __clang__
#define BEGIN_AVX512 _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512vl,avx512dq,avx512bw,avx2,fma\"))), apply_to = function)")
#define BEGIN_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define END _Pragma("clang attribute pop")
#else
#define BEGIN_AVX512 _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512vl,avx512dq,avx512bw,avx2,fma\")")
#define BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define END _Pragma("GCC pop_options")
#endif

BEGIN_AVX512
#define SUFFIX _avx512
#define V 16
#define MR 14
#define OB 8
#include "_native.h"
END

BEGIN_AVX2
#define SUFFIX _avx2
#define V 8
#define MR 6
#define OB 4
#include "_native.h"
END
#endif

#define SUFFIX _plain
#define V 4
#define MR 6
#define OB 4
#include "_native.h"

static const struct set {
    const char *name;
    int (*forward)(const struct conv *, float *, const float *, const float *, const float *, const float *, struct after, int);
    int (*input_gradient)(const struct conv *, float *, const float *, const float *, const float *, const float *, int);
    int (*weight_gradients)(const struct conv *, float *, float *, const float *, const float *, const float *,
                            const float *, int);
    int (*pool)(float *, const float *, int, int, int, int, int);
    void (*linear)(float *, const float *, const float *, const float *, int, int, int);
} sets[] = {
#if defined(__x86_64__)
    SET(avx512),
    SET(avx2),
#endif
    SET(plain),
};

static const struct set *used;

static int supported(const struct set *set)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(set->name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
    if (!strcmp(set->name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return set != NULL;
}

static PyObject *ended(int ok)
{
    if (!ok) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

typedef unsigned long long address;
#define AT(a) ((float *)(size_t)(a))
#define CONV "(iiiiiiiiiiiiiiiii)"
#define FIELDS(c) &c.B, &c.K, &c.H, &c.W, &c.Cin, &c.Ho, &c.Wo, &c.Cout, &c.kh, &c.kw, &c.sh, &c.sw, &c.ph, &c.pw, &c.dh, &c.dw, &c.groups

static PyObject *py_forward(PyObject *self, PyObject *args)
{
    address y, x, pi, bank, bias;
    struct conv c;
    int threads, ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKKKK" CONV "i", &y, &x, &pi, &bank, &bias, FIELDS(c), &threads)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    ok = used->forward(&c, AT(y), AT(x), AT(pi), AT(bank), AT(bias), (struct after){0}, threads);
    Py_END_ALLOW_THREADS
    return ended(ok);
}

static PyObject *py_input_gradient(PyObject *self, PyObject *args)
{
    address gx, gy, pi, bank, first;
    struct conv c;
    int threads, ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKKKK" CONV "i", &gx, &gy, &pi, &bank, &first, FIELDS(c), &threads)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    ok = used->input_gradient(&c, AT(gx), AT(gy), AT(pi), AT(bank), AT(first), threads);
    Py_END_ALLOW_THREADS
    return ended(ok);
}

static PyObject *py_weight_gradients(PyObject *self, PyObject *args)
{
    address gpi, gbank, gy, x, pi, bank;
    struct conv c;
    int threads, ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKKKKK" CONV "i", &gpi, &gbank, &gy, &x, &pi, &bank, FIELDS(c), &threads)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    ok = used->weight_gradients(&c, AT(gpi), AT(gbank), AT(gy), AT(x), AT(pi), AT(bank), threads);
    Py_END_ALLOW_THREADS
    return ended(ok);
}

static PyObject *py_pool(PyObject *self, PyObject *args)
{
    address mean, x;
    int B, H, W, C, threads, ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKiiiii", &mean, &x, &B, &H, &W, &C, &threads)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    ok = used->pool(AT(mean), AT(x), B, H, W, C, threads);
    Py_END_ALLOW_THREADS
    return ended(ok);
}

/* pi (B, K) from descriptors x (B, C): softmax or sigmoid of (FC2(ReLU(FC1(x))) / tau). */
static int gate(float *pi, const float *x, const float *const *fc, float tau, int B, int C, int hidden, int K, int sigmoid)
{
    float *h = room((size_t)B * hidden);
    if (!h) return 0;
    used->linear(h, x, fc[0], fc[1], B, C, hidden);
    for (size_t i = 0; i < (size_t)B * hidden; i++) h[i] = h[i] < 0 ? 0 : h[i]; /* NaN stays */
    used->linear(pi, h, fc[2], fc[3], B, hidden, K);
    leave(h);
    for (int b = 0; b < B; b++, pi += K) {
        float most = -INFINITY, total = 0;
        for (int k = 0; k < K; k++) pi[k] /= tau;
        for (int k = 0; k < K; k++) most = pi[k] > most ? pi[k] : most;
        for (int k = 0; k < K; k++) {
            pi[k] = sigmoid ? 1 / (1 + expf(-pi[k])) : expf(pi[k] - most);
            total += pi[k];
        }
        for (int k = 0; !sigmoid && k < K; k++) pi[k] /= total;
    }
    return 1;
}

/* Samples that are pooled before they are convolved, so that x is still in the cache; multiples of what is done at once. */
static int pooled_together(const struct conv *c, int threads)
{
    size_t sample = (size_t)c->H * c->W * c->Cin, n = c->groups > 1 ? POOLED / sample : SAMPLES;
    return (n < 1 ? 1 : (int)n) * threads;
}

/* A dense or depthwise layer whole: pooling, unless the mean of x is there, gate, mixing of the biases, convolution. */
static int layer(const struct conv *c, float *y, const float *x, const float *mean, const float *const *fc, float tau,
                 const float *bank, const float *bias_bank, struct after after, int hidden, int sigmoid, int threads)
{
    int K = c->K, C = c->Cin, Cout = c->Cout, together = mean ? c->B : pooled_together(c, threads), ok = 1;
    float *pooled = room((size_t)c->B * (C + K + Cout)), *pi = pooled + (size_t)c->B * C, *bias = bias_bank ? pi + (size_t)c->B * K : NULL;
    if (!pooled) return 0;
    for (int b = 0; ok && b < c->B; b += together) {
        struct conv part = *c;
        part.B = c->B - b < together ? c->B - b : together;
        const float *from = x + (size_t)b * c->H * c->W * C, *known = mean ? mean : pooled;
        struct after here = {after.activation, after.sums ? after.sums + (size_t)b * Cout : NULL};
        ok = (mean || used->pool(pooled, from, part.B, c->H, c->W, C, threads))
            && gate(pi, known, fc, tau, part.B, C, hidden, K, sigmoid);
        for (int i = 0; ok && bias && i < part.B; i++) {
            float *to = bias + (size_t)i * Cout, *p = pi + (size_t)i * K;
            for (int o = 0; o < Cout; o++) to[o] = p[0] * bias_bank[o];
            for (int k = 1; k < K; k++)
                for (int o = 0; o < Cout; o++) to[o] += p[k] * bias_bank[(size_t)k * Cout + o];
        }
        ok = ok && used->forward(&part, y + (size_t)b * c->Ho * c->Wo * Cout, from, pi, bank, bias, here, threads);
    }
    leave(pooled);
    return ok;
}

/* What torch.Tensor is asked: attributes and methods, which from here take a third of the time. */
static struct {
    PyObject *float32, *dtype, *is_cpu, *is_contiguous, *data_ptr, *numel;
} tensor_;

/* Where the data of a tensor are and how many floats; None has none. 1, or 0 if they are not float32 on a CPU, row by row, or -1
 * with an error set. */
static int plain(PyObject *tensor, float **at, size_t *floats)
{
    *at = NULL, *floats = 0;
    if (tensor == Py_None) return 1;
    PyObject *dtype = PyObject_GetAttr(tensor, tensor_.dtype), *cpu = PyObject_GetAttr(tensor, tensor_.is_cpu);
    PyObject *flat = PyObject_CallFunctionObjArgs(tensor_.is_contiguous, tensor, NULL);
    int ok = dtype == tensor_.float32 && cpu == Py_True && flat == Py_True;
    Py_XDECREF(dtype);
    Py_XDECREF(cpu);
    Py_XDECREF(flat);
    if (!ok) return PyErr_Occurred() ? -1 : 0;
    PyObject *data = PyObject_CallFunctionObjArgs(tensor_.data_ptr, tensor, NULL);
    PyObject *numel = PyObject_CallFunctionObjArgs(tensor_.numel, tensor, NULL);
    if (data && numel) {
        *at = (float *)(size_t)PyLong_AsUnsignedLongLong(data);
        *floats = (size_t)PyLong_AsUnsignedLongLong(numel);
    }
    Py_XDECREF(data);
    Py_XDECREF(numel);
    return PyErr_Occurred() ? -1 : 1;
}

#define GATE &fc[0], &fc[1], &fc[2], &fc[3], &tau
#define FC {AT(fc[0]), AT(fc[1]), AT(fc[2]), AT(fc[3])}

static PyObject *py_gate(PyObject *self, PyObject *args)
{
    address pi, x, fc[4], tau;
    int B, C, hidden, K, sigmoid, ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "KK(KKKKK)iiiii", &pi, &x, GATE, &B, &C, &hidden, &K, &sigmoid)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    const float *const at[4] = FC;
    ok = gate(AT(pi), AT(x), at, *AT(tau), B, C, hidden, K, sigmoid);
    Py_END_ALLOW_THREADS
    return ended(ok);
}

static PyObject *py_layer(PyObject *self, PyObject *args)
{
    address y, x, mean, mean_of_y;
    PyObject *tensors[7]; /* weight 1, bias 1, weight 2, bias 2, tau, bank, bias bank */
    float *at[7];
    size_t floats[7];
    struct conv c;
    int activation, sigmoid, threads, ok;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKK(OOOOO)OO" CONV "iKii", &y, &x, &mean, &tensors[0], &tensors[1], &tensors[2], &tensors[3], &tensors[4],
                          &tensors[5], &tensors[6], FIELDS(c), &activation, &mean_of_y, &sigmoid, &threads))
        return NULL;
    for (int i = 0; i < 7; i++)
        if ((ok = plain(tensors[i], &at[i], &floats[i])) <= 0) {
            if (ok < 0) return NULL;
            Py_RETURN_FALSE;
        }
    size_t K = c.K, hidden = floats[1], kernel = (size_t)c.Cout * (c.Cin / c.groups) * c.kh * c.kw;
    if (floats[0] != hidden * c.Cin || floats[2] != K * hidden || floats[3] != K || floats[4] != 1 || floats[5] != K * kernel
        || (at[6] && floats[6] != K * c.Cout))
        Py_RETURN_FALSE;
    Py_BEGIN_ALLOW_THREADS
    const float *const fc[4] = {at[0], at[1], at[2], at[3]};
    ok = layer(&c, AT(y), AT(x), AT(mean), fc, *at[4], at[5], at[6], (struct after){activation, AT(mean_of_y)}, (int)hidden, sigmoid,
               threads);
    Py_END_ALLOW_THREADS
    if (!ok) return PyErr_NoMemory();
    Py_RETURN_TRUE;
}

static PyObject *py_names(PyObject *self, PyObject *none)
{
    (void)self, (void)none;
    PyObject *found = PyList_New(0);
    for (size_t i = 0; found && i < sizeof sets / sizeof *sets; i++) {
        if (!supported(&sets[i])) continue;
        PyObject *name = PyUnicode_FromString(sets[i].name);
        if (!name || PyList_Append(found, name)) Py_CLEAR(found);
        Py_XDECREF(name);
    }
    return found;
}

static PyObject *py_use(PyObject *self, PyObject *args)
{
    const char *name;
    (void)self;
    if (!PyArg_ParseTuple(args, "s", &name)) return NULL;
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if (!strcmp(sets[i].name, name) && supported(&sets[i])) {
            used = &sets[i];
            Py_RETURN_NONE;
        }
    PyErr_Format(PyExc_ValueError, "no instruction set of this machine: %s", name);
    return NULL;
}

static PyMethodDef methods[] = {
    {"forward", py_forward, METH_VARARGS, "forward(y, x, pi, bank, bias or 0, conv, threads): addresses of float32"},
    {"input_gradient", py_input_gradient, METH_VARARGS, "input_gradient(gx, gy, pi, bank, first or 0, conv, threads)"},
    {"weight_gradients", py_weight_gradients, METH_VARARGS,
     "weight_gradients(gpi or 0, gbank or 0, gy, x, pi, bank, conv, threads)"},
    {"pool", py_pool, METH_VARARGS, "pool(mean, x, B, H, W, C, threads)"},
    {"gate", py_gate, METH_VARARGS, "gate(pi, x, (weight 1, bias 1, weight 2, bias 2, tau), B, C, hidden, K, sigmoid)"},
    {"layer", py_layer, METH_VARARGS,
     "layer(y, x, mean of x or 0, (weight 1, bias 1, weight 2, bias 2, tau), bank, bias bank or None, conv, activation, "
     "mean of y or 0, sigmoid, threads): whether it takes these parameters, which are tensors"},
    {"names", py_names, METH_NOARGS, "names() of the instruction sets of this machine, the best first"},
    {"use", py_use, METH_VARARGS, "use(name) of an instruction set"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *torch = PyImport_ImportModule("torch"), *tensor = torch ? PyObject_GetAttrString(torch, "Tensor") : NULL;
    if (tensor) {
        tensor_.float32 = PyObject_GetAttrString(torch, "float32");
        tensor_.dtype = PyUnicode_InternFromString("dtype");
        tensor_.is_cpu = PyUnicode_InternFromString("is_cpu");
        tensor_.is_contiguous = PyObject_GetAttrString(tensor, "is_contiguous");
        tensor_.data_ptr = PyObject_GetAttrString(tensor, "data_ptr");
        tensor_.numel = PyObject_GetAttrString(tensor, "numel");
    }
    Py_XDECREF(torch);
    Py_XDECREF(tensor);
    if (PyErr_Occurred()) return NULL;
    for (used = sets; !supported(used);) used++;
    return PyModule_Create(&module);
}
