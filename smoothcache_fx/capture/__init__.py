"""From a model's forward to compiled variants: Dynamo, AOTAutograd, the passes, inner compilers."""
