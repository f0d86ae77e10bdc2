/* Every function of every kernel library: what Python calls (bigtrain/ops/library.py reads this file).

   The same names are in libbt_cpu_*.so and libbt_cuda.so. Pointers are to contiguous memory of that
   library's device unless said otherwise; "host" pointers are to host memory in both. Nothing is
   allocated here. Sizes count elements. `dtype` is one of BT_FP32, BT_BF16, BT_FP16. A function
   returns BT_OK, or what is wrong: bt_error() says it in words. On CUDA it returns once the work is
   in the queue of `stream`; on the CPU `device` and `stream` are ignored, and it runs on as many
   threads as OpenMP has.

   Functions under "the same bits everywhere" give the same bits in every library and on any number
   of threads: each operation written here is rounded once (no fused multiply-add), in fp32 unless
   said otherwise, and sums are in the order that is written. A NaN is a NaN; which one may differ.

   One prototype a line or over several; comments hold no semicolons in front of a parenthesis. */
#ifndef BT_ABI_H
#define BT_ABI_H
#include <stdint.h>

#ifdef __cplusplus
#define BT_API extern "C" __attribute__((visibility("default")))
#else
#define BT_API
#endif

enum { BT_FP32 = 0, BT_BF16 = 1, BT_FP16 = 2 };
enum { BT_OK = 0, BT_BAD_ARGUMENT = 1, BT_CUDA_ERROR = 1000 /* plus the cudaError_t */ };

/* -- about the library ------------------------------------------------------------------------ */

/* The hash of the sources and flags that it was built from. */
BT_API const char *bt_key(void);
/* The instruction set or architectures that it was built for: "avx2", "sm_80 sm_90 sm_100". */
BT_API const char *bt_target(void);
/* What a status means. */
BT_API const char *bt_error(int status);

/* -- optimizers: the same bits everywhere ------------------------------------------------------ */

/* All updates: gradients are first divided by *divisor (null: not); if that is NaN or infinite
   nothing is changed (norms of LAMB then mean nothing). `param` is the low-precision parameter that `main` is rounded to, of
   param_dtype; null if there is none. */

/* AdamW. g = grad / divisor; p = main * decay;  m += one_minus_beta1 * (g - m);
   v = v * beta2 + one_minus_beta2 * g * g (from the left);
   main = p - step_size * m / (sqrt(v) / correction2 + eps), product before quotient. */
BT_API int bt_adamw(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                    int grad_dtype, float *exp_avg, float *exp_avg_sq, const float *divisor,
                    float decay, float one_minus_beta1, float beta2, float one_minus_beta2,
                    float step_size, float correction2, float eps, int device, void *stream);

/* SGD. g = grad / divisor + weight_decay * main; buffer = momentum * buffer + g (if not null);
   d = g + momentum * buffer (nesterov) or buffer or g;  main -= lr * d. */
BT_API int bt_sgd(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                  int grad_dtype, float *buffer, const float *divisor, float lr, float momentum,
                  float weight_decay, int nesterov, int device, void *stream);

/* LAMB, first half. m and v as in AdamW; u = (m / correction1) / (sqrt(v) / correction2 + eps)
   + weight_decay * main. norms[2 t] and norms[2 t + 1] become the sums of squares, in fp64, of main
   and u over tensor t = elements [offsets[t], offsets[t + 1]) of the block (int64, on the device;
   what lies before or behind all of them is padding, whose moments move too). Sums may differ in their last bits between
   libraries. `workspace` holds bt_lamb_workspace doubles. */
BT_API int bt_lamb_moments(int64_t n, const float *main, const void *grad, int grad_dtype,
                           float *exp_avg, float *exp_avg_sq, const float *divisor,
                           int64_t num_tensors, const int64_t *offsets, double *norms,
                           double *workspace, float one_minus_beta1, float beta2,
                           float one_minus_beta2, float correction1, float correction2, float eps,
                           float weight_decay, int device, void *stream);
BT_API int64_t bt_lamb_workspace(int64_t n, int64_t num_tensors);

/* LAMB, second half: main -= (lr * ratios[t]) * u, with u as above; nothing if divisor is not
   finite. Padding is not touched. */
BT_API int bt_lamb_apply(int64_t n, float *main, void *param, int param_dtype,
                         const float *exp_avg, const float *exp_avg_sq, const float *divisor,
                         int64_t num_tensors, const int64_t *offsets, const float *ratios, float lr,
                         float correction1, float correction2, float eps, float weight_decay,
                         int device, void *stream);

/* Lion. g = grad / divisor; c = exp_avg * beta1 + one_minus_beta1 * g;
   exp_avg = exp_avg * beta2 + one_minus_beta2 * g; main = main * decay - lr * sign(c), where the
   sign of zero and of NaN is c itself. */
BT_API int bt_lion(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                   int grad_dtype, float *exp_avg, const float *divisor, float decay, float beta1,
                   float one_minus_beta1, float beta2, float one_minus_beta2, float lr, int device,
                   void *stream);

/* Adagrad. g = grad / divisor + weight_decay * main; sum += g * g;
   main -= lr * g / (sqrt(sum) + eps), product before quotient. */
BT_API int bt_adagrad(int64_t n, float *main, void *param, int param_dtype, const void *grad,
                      int grad_dtype, float *sum, const float *divisor, float lr, float eps,
                      float weight_decay, int device, void *stream);

/* Adagrad of some rows of a table [num_rows, row_size]: rows[i] (strictly increasing) has gradient
   grad[i]. g = grad / divisor + weight_decay * main; per_row: sum[row] += mean of g * g (fp32: 64
   lanes, element j to lane j % 64, then halves added to each other); else sum[row][j] += g * g;
   main -= lr * g / (sqrt(sum) + eps), product before quotient. */
BT_API int bt_adagrad_rows(int64_t num_given, int64_t row_size, const int64_t *rows, float *main,
                           void *param, int param_dtype, const void *grad, int grad_dtype,
                           float *sum, int per_row, const float *divisor, float lr, float eps,
                           float weight_decay, int device, void *stream);

/* The sum of squares and the number of elements that are NaN or infinite, of num_tensors tensors of
   one dtype: `pointers` and `sizes` are host arrays. With a divisor the elements are divided by it
   first (in fp32, and the squares are of that), and with `write` stored so. Sums are in fp64, all
   in 16 lanes: item j of a list to lane j % 16, then halves added to each other (8, 4, 2, 1). The
   squares of 1024 elements, from the start of a tensor, are a part; 64 parts of a tensor (65536
   elements) are a chunk; the chunks of all tensors, in order, are the sum. What is last may be
   short. out[0], out[1]; `workspace` holds 2 doubles a chunk. */
BT_API int bt_grad_norm(int64_t num_tensors, void *const *pointers, const int64_t *sizes, int dtype,
                        const float *divisor, int write, double *workspace, double *out,
                        int device, void *stream);

/* -- compression: the same bits everywhere ------------------------------------------------------ */

/* Blocks of `block` elements (a multiple of 64) from the start; the last may be short. Scales are
   fp32 or bf16 (scale_dtype), one a block; what is computed with is the rounded one. A sum over a
   block: 64 fp32 lanes, element j to lane j % 64 from first to last, then halves added to each
   other (32, 16, ... 1). A block whose scale would not be finite, since x has a NaN or infinity or is
   too large: its scale is NaN, its bits or codes are zero bytes, and its state, residual or replica
   stays. */

/* Signs with error feedback, the residual kept lazily: the state (v, s) stands for the residual
   e = v - copysign(s, v). v' = x + e; s' = sqrt(sum v'^2 / count) (mean_abs = 0) or
   sum |v'| / count (1), rounded to scale_dtype; bit j % 8 of byte j / 8 is the sign bit of v'.
   state is v, state_scales is s (fp32), both in place; scales is s' for the wire. `bits` has
   (n + 7) / 8 bytes, the bits behind n are zero. */
BT_API int bt_sign_pack(int64_t n, int64_t block, const void *x, int x_dtype, float *state,
                        float *state_scales, void *scales, int scale_dtype, uint8_t *bits,
                        int mean_abs, int device, void *stream);

/* The residual that a state stands for: out = v - copysign(s, v). */
BT_API int bt_sign_residual(int64_t n, int64_t block, const float *state, const float *state_scales,
                            float *out, int device, void *stream);

/* out = weight * (sum over sources in order of +-scale), fp32. Source k has its bits at
   bits + k * bits_stride bytes and its scales at byte scales + k * scales_stride. */
BT_API int bt_sign_unpack_mean(int64_t n, int64_t block, int64_t num_sources, const uint8_t *bits,
                               int64_t bits_stride, const void *scales, int64_t scales_stride,
                               int scale_dtype, float weight, float *out, int device, void *stream);

/* Block quantisation to num_bits 4 or 8. v = x + residual (null: x); s = max |v| / (7 or 127),
   rounded to scale_dtype; q = v / s, to the nearest even whole number, within +-7 or +-127 (s = 0:
   q = 0); residual = v - q * s. Codes: 8 bits a signed byte; 4 bits q + 8, the even element in the
   low half; (n * num_bits + 7) / 8 bytes. */
BT_API int bt_quantize(int64_t n, int64_t block, int num_bits, const void *x, int x_dtype,
                       float *residual, void *scales, int scale_dtype, uint8_t *codes, int device,
                       void *stream);

/* out = weight * (sum over sources in order of q * s), of out_dtype. Strides in bytes, as above. */
BT_API int bt_dequantize_mean(int64_t n, int64_t block, int num_bits, int64_t num_sources,
                              const uint8_t *codes, int64_t codes_stride, const void *scales,
                              int64_t scales_stride, int scale_dtype, float weight, void *out,
                              int out_dtype, int device, void *stream);

/* Quantises main - replica, and moves `replica` (of dtype) as bt_delta_apply moves it elsewhere. */
BT_API int bt_delta_pack(int64_t n, int64_t block, int num_bits, const float *main, void *replica,
                         int dtype, void *scales, int scale_dtype, uint8_t *codes, int device,
                         void *stream);

/* replica = replica + q * s, computed in fp32 and rounded once to dtype; a block whose scale is NaN
   stays. */
BT_API int bt_delta_apply(int64_t n, int64_t block, int num_bits, const uint8_t *codes,
                          const void *scales, int scale_dtype, void *replica, int dtype, int device,
                          void *stream);

/* -- model: computed in fp32, stored in dtype; last bits may differ between libraries ----------- */

/* LayerNorm (rms = 0) or RMSNorm (1) of rows of x [rows, cols], or of x + residual (null: x), which
   is then written to `sum` (rounded to dtype, and the rounded one is normalised). y = (t - mean) *
   rstd * weight + bias; weight and bias are of dtype, each may be null. stats [rows, 2] is mean
   (RMSNorm: 0) and rstd. */
BT_API int bt_norm_forward(int rms, int64_t rows, int64_t cols, const void *x, const void *residual,
                           const void *weight, const void *bias, float eps, void *sum, void *y,
                           float *stats, int dtype, int device, void *stream);

/* dx of what was normalised (x, or sum), plus dsum (null: nothing) which came to it by another way.
   dweight, dbias [cols] fp32, each may be null. `workspace` holds bt_norm_workspace floats. The
   order of sums does not depend on the number of threads. */
BT_API int bt_norm_backward(int rms, int64_t rows, int64_t cols, const void *dy, const void *x,
                            const void *weight, const float *stats, const void *dsum, void *dx,
                            float *dweight, float *dbias, float *workspace, int dtype, int device,
                            void *stream);
BT_API int64_t bt_norm_workspace(int64_t rows, int64_t cols);

/* out = silu(gate) * up, [rows, cols]; rows of gate and up are a stride apart, out is contiguous. */
BT_API int bt_swiglu_forward(int64_t rows, int64_t cols, const void *gate, int64_t gate_stride,
                             const void *up, int64_t up_stride, void *out, int dtype, int device,
                             void *stream);
/* dgate and dup have the strides that are given for them. */
BT_API int bt_swiglu_backward(int64_t rows, int64_t cols, const void *dout, const void *gate,
                              int64_t gate_stride, const void *up, int64_t up_stride, void *dgate,
                              int64_t dgate_stride, void *dup, int64_t dup_stride, int dtype,
                              int device, void *stream);

/* out = gelu(x + bias) (bias of dtype, may be null): by tanh, or exact (by erf). */
BT_API int bt_bias_gelu_forward(int64_t rows, int64_t cols, const void *x, const void *bias,
                                int by_tanh, void *out, int dtype, int device, void *stream);
/* dx may be dout; dbias [cols] fp32 may be null; `workspace` holds bt_bias_gelu_workspace floats. */
BT_API int bt_bias_gelu_backward(int64_t rows, int64_t cols, const void *dout, const void *x,
                                 const void *bias, int by_tanh, void *dx, float *dbias,
                                 float *workspace, int dtype, int device, void *stream);
BT_API int64_t bt_bias_gelu_workspace(int64_t rows, int64_t cols);

/* Rotary embedding: turns each pair of channels (i, i + head_size / 2) of x [batch, seq, heads,
   head_size], whose first three strides are given in elements (the last is 1), by the angle whose
   cosine and sine are table[0][t][i] and table[1][t][i], with the second times `direction` (1, or
   -1 for the way back). table is [2, table_len, head_size / 2] fp32. out may be x itself. */
BT_API int bt_rotary(int64_t batch, int64_t seq, int64_t heads, int64_t head_size, const void *x,
                     int64_t x_batch_stride, int64_t x_seq_stride, int64_t x_head_stride, void *out,
                     int64_t out_batch_stride, int64_t out_seq_stride, int64_t out_head_stride,
                     const float *table, int64_t table_len, float direction, int dtype, int device,
                     void *stream);

/* y = softmax(scale * x) along the last dim of x [batch, heads, queries, keys], contiguous, over
   the keys that are allowed: with `causal`, key k for query t if k <= t + keys - queries; with
   `mask` (bytes, nonzero = allowed) where it says so, its first three strides given in elements
   (0 = the same for all, the last is 1). A row with no allowed key is zero. y may be x. */
BT_API int bt_softmax_forward(int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                              const void *x, float scale, int causal, const uint8_t *mask,
                              int64_t mask_batch_stride, int64_t mask_head_stride,
                              int64_t mask_query_stride, void *y, int dtype, int device,
                              void *stream);
/* dx = scale * y * (dy - sum(dy * y)); dx may be dy. */
BT_API int bt_softmax_backward(int64_t rows, int64_t cols, const void *dy, const void *y,
                               float scale, void *dx, int dtype, int device, void *stream);

/* Cross entropy of logits [rows, cols], rows a stride apart, of which this rank may have a part of
   the columns: most = max, total = sum exp(x - most), wanted = x[target] (0 if target is not in
   [0, cols)), sum = sum x (may be null), each [rows] fp32. Of a row that is all -inf, or has no
   columns, most is the lowest finite fp32 and total 0. */
BT_API int bt_cross_entropy_forward(int64_t rows, int64_t cols, const void *logits,
                                    int64_t row_stride, const int64_t *targets, float *most,
                                    float *total, float *wanted, float *sum, int dtype, int device,
                                    void *stream);
/* grad = (exp(x - log_sum) * (1 + 2 * z_loss * log_sum) - uniform - hit * [target]) * scale, with
   log_sum and scale [rows] fp32. grad is [rows, cols], rows grad_stride apart, and may be logits. */
BT_API int bt_cross_entropy_backward(int64_t rows, int64_t cols, const void *logits,
                                     int64_t row_stride, const int64_t *targets,
                                     const float *log_sum, const float *scale, float z_loss,
                                     float uniform, float hit, void *grad, int64_t grad_stride,
                                     int dtype, int device, void *stream);

/* out = residual + dropout(x + bias), x [samples, outer, inner] contiguous; bias [cols] where cols
   divides inner; bias and residual may be null, out may be x or residual. x is a part of samples of
   [outer, full_inner], from column `offset` on. Element number e of a whole sample is dropped if
   its random 32 bits are less than `threshold`, else multiplied by `keep_scale`. They are word
   (e / 16) % 4 of Philox-4x32-10 with counter (low, high, 0, 0) of the 64-bit number
   (e / 64) * 16 + e % 16, and key (low, high) of seeds[sample] + salt (mod 2^64).
   Backward of x is the same function of dout, with no bias and no residual. */
BT_API int bt_bias_dropout_residual(int64_t samples, int64_t outer, int64_t inner,
                                    int64_t full_inner, int64_t offset, int64_t cols, const void *x,
                                    const void *bias, const void *residual, const int64_t *seeds,
                                    int64_t salt, uint32_t threshold, float keep_scale, void *out,
                                    int dtype, int device, void *stream);

#endif
