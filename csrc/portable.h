// For functions that both the host and a GPU call.
#pragma once

#if defined(__CUDACC__)
#define TB_DEVICE __host__ __device__
#else
#define TB_DEVICE
#endif
