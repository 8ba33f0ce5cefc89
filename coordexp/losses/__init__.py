"""Loss atoms and objectives: pure torch, rows of logits in, (sum, count) out.

    sums          SumCount, what every atom returns
    columns       CoordColumns: which logit columns are the coordinate tokens
    distribution  CoordDistribution: log-probabilities and expectations over the K bins, computed once
    coord         atoms and monitors on coordinate slots
    box           box decoding, smooth L1 and CIoU
    text          cross-entropy over the whole vocabulary
    inputs        SupervisedRows and LossInputs: what an objective may look at
    stage1        the stage-1 objective
    modules       typed settings of the stage-2 module lists
    objective     the stage-2 objective
    head          the same objectives from hidden states, without ever building [B, T, V]

An atom never divides by a local count: whoever combines atoms divides by the count over the whole
optimizer step, so that the loss does not depend on how a step is cut into micro-batches and ranks.
"""
