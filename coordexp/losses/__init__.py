"""Loss atoms and objectives: pure torch, rows of logits in, (sum, count) out.

    sums        SumCount, what every atom returns
    columns     CoordColumns: which logit columns are the coordinate tokens
    coord       the distribution over bins; atoms and monitors on coordinate slots
    box         box decoding, smooth L1 and CIoU
    inputs      SupervisedRows and LossInputs: all an objective may look at
    stage1      the stage-1 objective
    modules     stage 2: kinds of forwards, module settings, weights of text tokens
    objective   the stage-2 objective

An atom never divides by a local count: whoever combines atoms divides by the count over the whole
optimizer step, so that the loss does not depend on how a step is cut into micro-batches and ranks.
"""
