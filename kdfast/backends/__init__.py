"""Kernels, one package per backend, one module per op; each package registers itself with the dispatch table.

A backend may leave out ops and inputs and give way to another one (`cuda` to `triton`), whose row statistics it then shares.

What every backend's module of an op must offer. Shapes: N rows, Vs and Vt vocabularies, Vc = min(Vs, Vt).
All tensors are on one device; rows have unit stride along the vocabulary and any stride between rows. `labels`, `scale` and the
tables of sparse targets are contiguous; a bias may have any stride.

`logits`
    forward(student [N,Vs], teachers [[N,Vt], ...], labels [N] int64 | None, scale [N], options, need_parts, grad | None)
        -> loss [N], stats [N,3+len(teachers)], parts [N,len(PARTS)] (or [0] when not asked for)
    backward(student, teachers, labels, scale, stats, options, grad) -> None
    `scale` multiplies a row's loss and gradient; a row with scale 0 is not read (its loss, parts and gradient are 0).
    `grad` [N,Vs] receives d(sum of loss)/d(student); it may be `student` itself. `stats` are what the same
    backend's backward needs of a row, in float64: what is subtracted from a logit of 640 must not round it.
    Logits go through their side's head first (`options.student_softcap` ...), and gradients back through it. The teachers
    are one distribution over the Vc ids that all have: the weighted mean of their probabilities at T (at 1 for the parts
    at 1), or of their logits. `options.kind` and `options.coefficients` say which divergence.
    A term of weight 0 is no term: an infinite divergence or cross-entropy leaves loss and gradient as they are without it.
    A row with a NaN or +inf logit, or a label outside [0, Vs) other than ignore_index, gets loss NaN, whatever the weights;
    nothing is read out of bounds and nothing raises: `ops` reads the losses and names the row.

`linear`
    forward(student: Side, teachers: [Side, ...], labels, scale, options, chunking: Chunking, need_parts, needs: Needs)
        -> loss [N], parts, grad_hidden, grad_weight (float32), grad_bias (float32); what is not needed has size 0
    product(side: Side, out [N,V]) -> None: out = hidden @ weight.T + bias in the dtype of out
    `Side`, `Needs` and `Chunking` are those of `kdfast.chunks`, whose `linear_rows` is the loop over chunks. It asks the row
    kernel (argument `kernel`, by default `forward` of `logits`) to write gradients in another dtype than the logits have, and
    gives it the rows of `row_inputs` (a last argument) after the teachers' logits. Hidden states of rows with scale 0 may hold
    anything.

`parallel`
    log_sums, row_sums, gradient: a slice of the vocabulary before, between and after the exchanges of `ops.parallel`;
    see `reference.parallel`, the only one.

`topk`
    capture(logits [N,V], k, temperatures, draws [N,n] float64 | None, sample_temperature, head)
        -> ids [N,k+n] int32, logprobs [N,k+n], log_z [N,n_T], log_tail [N,n_T], weights [N,k+n] (of size 0 without draws)
    forward(student [N,V], targets, labels, scale, options, vocab_size, spread, need_parts, grad | None)
        -> loss [N], stats [N,4], parts
    backward(student, targets, labels, scale, stats, options, vocab_size, spread, grad) -> None
    Capture: the k largest, then distinct ids drawn from the others in id order, then empty slots (id -1, log-probability
    -inf, weight 0). A draw u in [0, 1) takes the first id at which the running sum of softmax(logits / sample_temperature) over
    the others exceeds u. A bad row has NaN in log_z and logprobs.
    Loss: `targets` are M = len(options.teacher_weights) of them, as ids [N,K], log_p [N,M,K], log_tail [N,M], mass [N,M]: the
    log-probabilities at options.temperature of the ids in K slots (-inf: not an entry of that target; an id in two slots counts
    with the sum; id -1: no slot) and of all other ids < vocab_size together, which lies on them evenly (spread) or as the
    student's own. Both sum to 1. The soft term is the sum over m of teacher_weights[m] * (mass * D + mass * log(mass)) over ids
    < vocab_size, D forward KL, reverse KL or JSD. NaN in a table, an id >= vocab_size, or a sum that is further from 1 than
    MASS_ERROR where mass is not 0, makes the row's loss NaN. Of the parts teacher_nll and teacher_entropy are left 0. `stats`
    as for `logits`.

`attention`
    forward(q_s [B,H,Lq,ds], k_s [B,Hs,Lk,ds], q_t [B,H,Lq,dt], k_t [B,Ht,Lk,dt], query_mask [B,Lq] | None,
            key_mask [B,Lk] | None, scale [B,H], options, need_grad)
        -> loss [B,H], grad_q, grad_k in the student's dtype (of size 0 when not asked for)
    map_forward(maps_s [B,H,Lq,Lk], maps_t, mask of the same shape | None, scale [B,H], need_grad) -> loss [B,H], grad
    options is an `AttentionOptions`. Strides are free. Query head h sees key head h * Hs // H. `scale` multiplies a head's
    loss and gradient; the loss is a sum over the pairs (kl: rows) that both masks and causality let count. What a mask
    leaves out is not used, whatever it holds; `ops` has the masks leave out all that is in no pair that counts. A query that
    sees no key gives 0. NaN or infinity that counts makes the head's loss not finite. No dimension is 0. Memory grows with
    Lq + Lk, not their product, except in `reference`.

`hidden`
    mse(student [N,Ds], projection [D,Ds] | None, bias [D] | None, teacher [N,D], scale [N], needs: Needs)
        -> loss [N], grad_hidden, grad_projection (float32), grad_bias (float32); what is not needed has size 0
    cosine(student [N,D], teacher [N,D], scale [N], need_hidden) -> loss [N], grad_hidden
    Loss of a row: mean of squares of student @ projection.T + bias - teacher, or 1 - cos (1, without gradient, when
    either side is 0), times its scale. A row with scale 0 gives loss and gradients 0 whatever it holds.

`linear_logit_mse`
    forward(student: Side, teacher: Side, mask [N] bool | None, center, method, needs: Needs)
        -> loss [], grad_hidden, grad_weight (float32); what is not needed has size 0
    Both heads have V rows and no bias. The loss is the mean over V and the rows that count; `kdfast.logit_grams` holds what
    the backends share. Only `reference` forms N x V logits.

`codec`
    decode(data [bytes] uint8, offsets [N] int64, counts [N] int32, layout: CodecLayout)
        -> ids [N,k] int32, logprobs [N,k], log_z [N,n_T], log_tail [N,n_T], weights [N,k] (of size 0 without samples)
    Rows of the teacher cache; docs/cache-format.md, section 4, says what their bytes are, and every float bit for bit. A row
    begins behind its count, which is in `counts`; one of 0 entries is empty whatever its offset. The last CODEC_SLACK bytes of
    `data` belong to no row. Whatever bytes, offsets and counts are, nothing else is read: a row that no writer produces gets
    ids 0 and NaN everywhere else.

`scale`
    scale_(grad, upstream []) -> None: grad *= upstream in place, leaving at once when upstream is 1

Float inputs are float32, bfloat16 or float16 with float32 arithmetic, float32 loss and parts, and float64 stats;
`reference` also takes float64 and then computes everything in float64.
"""

from kdfast.backends import compiled, cuda, reference, triton

__all__ = ["compiled", "cuda", "reference", "triton"]
