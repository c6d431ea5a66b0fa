// Binds the attention kernels.
#include "cpu/attention.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "binding.h"

namespace py = pybind11;

namespace kdfast {
namespace {

template <std::size_t N>
void copy_to(int64_t (&to)[N], const std::array<int64_t, N>& from) {
    std::copy(from.begin(), from.end(), to);
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def(
        "attention_tile",
        [](int kind, std::uintptr_t difference, std::uintptr_t teacher, std::array<int64_t, 3> sizes, int64_t first_group,
           int64_t first_row, int64_t groups_per_batch, int64_t heads, int64_t queries, std::uintptr_t query_mask,
           std::uintptr_t key_mask, int64_t mask_keys, std::uintptr_t scale, std::uintptr_t loss, float factor_s, float factor_t,
           bool causal, int threads) {
            const AttentionTile tile{static_cast<AttentionKind>(kind),
                                     pointer<float>(difference),
                                     pointer<float>(teacher),
                                     sizes[0],
                                     sizes[1],
                                     sizes[2],
                                     first_group,
                                     first_row,
                                     groups_per_batch,
                                     heads,
                                     queries,
                                     pointer<const uint8_t>(query_mask),
                                     pointer<const uint8_t>(key_mask),
                                     mask_keys,
                                     pointer<const float>(scale),
                                     pointer<double>(loss),
                                     factor_s,
                                     factor_t,
                                     causal,
                                     safe_threads(threads)};
            py::gil_scoped_release release;
            KDFAST_CALL(attention_tile, tile);
        },
        "Loss and, in the place of `difference`, the gradient of one tile of scores.", py::arg("kind"), py::arg("difference"),
        py::arg("teacher"), py::arg("sizes"), py::arg("first_group"), py::arg("first_row"), py::arg("groups_per_batch"),
        py::arg("heads"), py::arg("queries"), py::arg("query_mask"), py::arg("key_mask"), py::arg("mask_keys"),
        py::arg("scale"), py::arg("loss"), py::arg("factor_s"), py::arg("factor_t"), py::arg("causal"), py::arg("threads"));
    m.def(
        "attention_direct",
        [](int kind, std::array<std::uintptr_t, 4> sides, std::array<std::uintptr_t, 2> grads, std::array<int64_t, 6> sizes,
           std::uintptr_t query_mask, std::uintptr_t key_mask, std::uintptr_t scale, std::uintptr_t loss, float scale_s, float ratio,
           bool causal, int threads) {
            const AttentionDirect maps{static_cast<AttentionKind>(kind),
                                       pointer<const float>(sides[0]),
                                       pointer<const float>(sides[1]),
                                       pointer<const float>(sides[2]),
                                       pointer<const float>(sides[3]),
                                       pointer<float>(grads[0]),
                                       pointer<float>(grads[1]),
                                       sizes[0],
                                       sizes[1],
                                       sizes[2],
                                       sizes[3],
                                       sizes[4],
                                       sizes[5],
                                       pointer<const uint8_t>(query_mask),
                                       pointer<const uint8_t>(key_mask),
                                       pointer<const float>(scale),
                                       pointer<double>(loss),
                                       scale_s,
                                       ratio,
                                       causal,
                                       safe_threads(threads)};
            py::gil_scoped_release release;
            KDFAST_CALL(attention_direct, maps);
        },
        "Loss and gradients of whole maps; sizes are groups, groups a batch, heads a group, queries, keys, head size.",
        py::arg("kind"), py::arg("sides"), py::arg("grads"), py::arg("sizes"), py::arg("query_mask"), py::arg("key_mask"),
        py::arg("scale"), py::arg("loss"), py::arg("scale_s"), py::arg("ratio"), py::arg("causal"), py::arg("threads"));
    m.def(
        "attention_maps",
        [](std::uintptr_t student, int student_dtype, std::uintptr_t teacher, int teacher_dtype, std::uintptr_t grad,
           std::uintptr_t mask, std::array<int64_t, 4> sizes, std::array<int64_t, 3> student_strides,
           std::array<int64_t, 3> teacher_strides, std::array<int64_t, 4> mask_strides, std::uintptr_t scale,
           std::uintptr_t loss, int threads) {
            AttentionMaps maps{};
            maps.student = pointer<const char>(student);
            maps.teacher = pointer<const char>(teacher);
            maps.grad = pointer<char>(grad);
            maps.mask = pointer<const uint8_t>(mask);
            maps.student_dtype = static_cast<Dtype>(student_dtype);
            maps.teacher_dtype = static_cast<Dtype>(teacher_dtype);
            copy_to(maps.sizes, sizes);
            copy_to(maps.student_strides, student_strides);
            copy_to(maps.teacher_strides, teacher_strides);
            copy_to(maps.mask_strides, mask_strides);
            maps.scale = pointer<const float>(scale);
            maps.loss = pointer<double>(loss);
            maps.threads = safe_threads(threads);
            py::gil_scoped_release release;
            KDFAST_CALL(attention_maps, maps);
        },
        "Squared difference of two maps and its gradient; strides count elements.", py::arg("student"),
        py::arg("student_dtype"), py::arg("teacher"), py::arg("teacher_dtype"), py::arg("grad"), py::arg("mask"),
        py::arg("sizes"), py::arg("student_strides"), py::arg("teacher_strides"), py::arg("mask_strides"), py::arg("scale"),
        py::arg("loss"), py::arg("threads"));
}

}  // namespace kdfast
