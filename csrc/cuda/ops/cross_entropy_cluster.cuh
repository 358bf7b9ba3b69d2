// Cross-entropy of rows of 16 bits and its gradient as a pipeline over rows; in cross_entropy_cluster.cu.
#pragma once

#include "megatune/cuda_loss.h"

namespace megatune::cuda {

// Whether the pipeline is for logits like these, and for the current device.
bool cluster_takes(const CrossEntropy& args);

// loss: [rows]. The logits become their gradient.
int cross_entropy_cluster(const CrossEntropy& args, float* loss, Stream stream);

}  // namespace megatune::cuda
