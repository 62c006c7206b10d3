#define HICL_ISA avx512
#include "rows_impl.h"
