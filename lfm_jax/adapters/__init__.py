"""LoRA: small trained matrices beside frozen ones, as functions of trees of weights.

`config`: what is adapted and how; `targets`: which matrices of a model that is; `weights`: the kind of weight that
computes with both; `trees`: adapters made, put on a model, merged into it; `peft`: the files of PEFT.
"""
