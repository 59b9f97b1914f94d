# SPDX-License-Identifier: Apache-2.0
#
# A guest of one boot sector that needs only a CPU: it counts in its memory
# without end. It runs where Linux does not, under a KVM without hardware
# virtualization, whose instruction emulator knows simple code only; hence no
# stack, no interrupts, no string instructions, no paging.
#
#     for pass = 1, 2, 3, ...
#         for each page in [FIRST, ram_end)
#             increment the page's counter        (must read as pass - 1)
#             in pass 1, write the page's own name beside it
#         write the pass number to the serial port
#
# So at any moment the pages hold pass up to some page, and pass - 1 from there
# on, and all the rest of each page is zero. verify.go checks that. registers.go
# checks that the CPU is at this page and in this pass: without that, a guest
# whose last writes were lost would look like one that has not counted further.
#
# The counter's place in the page depends on the page (SLOT), so that the content
# of a page that lands at another's place is in the wrong place, too:
#
#     SLOT(address) = (address / 4096 % 512) * 8
#     SLOT + 0: counter, 32 bit      SLOT + 4: address ^ NAME, 32 bit
#
# Pages must be zero at first. Clearing them takes the emulator too long (15 s
# for 64 MiB), so FIRST and ram_end leave out what the BIOS used.
#
# Built as a flat binary for 0x7c00, where the BIOS loads a boot sector.

    .intel_syntax noprefix

    .set FIRST, 0x200000        # above the BIOS's and this sector's memory
    .set NAME, 0x6d657461       # "atem" in memory: the page's name is not its address alone
    .set COM1, 0x3f8            # data register; line status is 5 above
    .set THR_EMPTY, 0x20        # line status: the next byte may be written

    .code16
    .globl _start
_start:
    cli
    xor ax, ax                  # the BIOS promises no segment values
    mov ds, ax
    in al, 0x92                 # A20 on, so that odd megabytes are not aliases
    or al, 2
    out 0x92, al
    lgdt [gdt_pointer]
    mov eax, cr0
    or al, 1                    # protected mode
    mov cr0, eax
    .att_syntax
    ljmp $8, $flat
    .intel_syntax noprefix

    .code32
flat:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov ebp, [ram_end]
    xor ebx, ebx                # pass
next_pass:
    inc ebx
    mov edi, FIRST
    .org 0x80, 0x90             # at nextPage of registers.go: edi is the page, ebx the pass
next_page:
    mov esi, edi                # esi = edi + SLOT(edi)
    shr esi, 9
    and esi, 0xff8
    add esi, edi
    mov eax, [esi]
    inc eax
    mov [esi], eax
    cmp ebx, 1
    jne named
    mov eax, edi
    xor eax, NAME
    mov [esi + 4], eax
named:
    add edi, 4096
    cmp edi, ebp
    jb next_page

    .org 0xc0, 0x90             # from here on all pages hold ebx
    mov edi, ebx                # the line: eight hexadecimal digits
    mov esi, 8
next_digit:
    mov ecx, edi
    shr ecx, 28
    add ecx, '0'
    cmp ecx, '9'
    jbe digit
    add ecx, 'a' - '0' - 10
digit:
    mov edx, COM1 + 5
1:  in al, dx
    and al, THR_EMPTY
    jz 1b
    mov eax, ecx
    mov edx, COM1
    out dx, al
    shl edi, 4
    dec esi
    jnz next_digit
    mov edx, COM1 + 5
2:  in al, dx
    and al, THR_EMPTY
    jz 2b
    mov eax, 10                 # end of line
    mov edx, COM1
    out dx, al
    jmp next_pass

    .balign 8
gdt:                            # flat 4 GiB segments: selector 8 code, 16 data
    .quad 0
    .quad 0x00cf9a000000ffff
    .quad 0x00cf92000000ffff
gdt_pointer:
    .word 23
    .long gdt

# The parameter, at a fixed offset from the start, filled in by metal.go.
    .org 0x1f0
ram_end:
    .long 0

    .org 0x1fe
    .word 0xaa55                # "this is a boot sector"
